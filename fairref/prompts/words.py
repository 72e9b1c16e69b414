"""Find the words of a prompt that name a class of an attribute. Such a prompt asks for one class, not for fairness.

This compares with lists of words: "a princess cake" counts as naming a gender, "someone with a beard" does not.
"""

import re

PERSON = r"(?:\w+ )?(?:person|people|face|skin|m[ae]n|wom[ae]n|male|female|lady|gentleman|girl|boy)"
TITLES = (  # words with -man and -woman, so German, shaman and specimen are left out
    "alder|anchor|barrow|boat|bonds|business|camera|chair|church|clergy|congress|council|country|crafts|dairy|delivery"
    "|door|drafts|draughts|ferry|fire|fisher|foot|fore|frontiers|garbage|gentle|guards|handy|hench|herds|horse|hunts|ice"
    "|journey|lay|line|mail|marks|mid|milk|motor|news|night|noble|oars|ombuds|orchard|patrol|pitch|plow|police|post|repair"
    "|sales|service|show|signal|sound|spokes|sports|states|stunt|trades|trash|tribes|watch|weather|wood|work|yacht"
    "|yachts"
)
WORDS = {  # attribute -> patterns of whole words; colours and "old" count only beside a word for a person
    "gender": (
        r"(?:wo)?m[ae]n|(?:fe)?males?|he|she|his|hers?|him|(?:boy|girl|lad|guy)s?|lad(?:y|ies)",
        rf"(?:{TITLES})-?(?:wo)?m[ae]n|(?:cow|school)(?:boy|girl)s?|(?:head|school)m(?:aster|istress)(?:es|s)?",
        r"(?:(?:step|grand)-?)?(?:mother|father|son|daughter)s?|sisters?|brothers?|(?:house)?wi(?:fe|ves)|husbands?",
        r"(?:king|queen|prince|lord|monk|nun|(?:bride)?groom|bride|waiter|masseuse|ballerina)s?|sir",
        r"(?:house|chamber|bar|milk|brides|mer)?maids?",
        r"(?:actr|duch|godd|govern|heir|host|huntr|lion|mistr|priest|princ|seamstr|songstr|steward|waitr)ess(?:es)?",
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
    """Return the first words that name a class of the attribute; "" if there are none, or no list of words."""
    if attribute not in WORDS:
        return ""
    match = re.search(rf"(?<![\w-])(?:{'|'.join(WORDS[attribute])})(?![\w-])", prompt, re.IGNORECASE)
    return match[0] if match else ""
