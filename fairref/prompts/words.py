"""Which words of a prompt name a class of an attribute: its pictures are then not free to be fair.

Lists, not understanding: "the wives of windsor" names a gender, "someone with a beard" does not.
"""

import re

PERSON = r"(?:\w+ )?(?:person|people|face|skin|m[ae]n|wom[ae]n|male|female|lady|gentleman|girl|boy)"
WORDS = {  # attribute -> patterns of whole words; a colour, or "old", only of a person
    "gender": (
        r"(?!hu)\w*(?:wo)?m[ae]n|(?:fe)?males?|he|she|his|hers?|him|(?:boy|girl|lad|guy)s?|lad(?:y|ies)",
        r"(?:grand)?(?:mother|father|son|daughter)s?|sisters?|brothers?|wi(?:fe|ves)|husbands?|king|queen|prince|lord|sir",
        r"\w*(?:waiter|cowboy|maid|wife|master|mistress|groom|bride|nun|monk|priest|seamster)s?",
        r"\w+tress(?:es)?|(?:host|steward|godd|govern|princ|duch|heir|lion)ess(?:es)?|masseuse|ballerina",
    ),
    "race": (
        r"asian|african|african-american|arab|caucasian|european|hispanic|indian|latin[oa]|middle[- ]eastern",
        rf"(?:black|brown|white) {PERSON}",
    ),
    "skin_tone": (
        r"[\w-]+-skinned",
        rf"(?:black|brown|white) {PERSON}|(?:light|pale|fair|medium|tanned|dark) skin",
    ),
    "age": (
        r"young|younger|teenage|teenagers?|middle-aged|elderly|years? old|\d+-year-old",
        rf"old {PERSON}|face of an? old",
    ),
}


def naming(prompt: str, attribute: str) -> str:
    """The first words that name a class of the attribute; "" if none does, or of an attribute without a list."""
    if attribute not in WORDS:
        return ""
    found = re.search(rf"(?<![\w-])(?:{'|'.join(WORDS[attribute])})(?![\w-])", prompt, re.IGNORECASE)
    return found[0] if found else ""
