"""Cut the two sprite sheets, people and things of the small world, from Noto Color Emoji (OFL-1.1).

    fairref emoji sheet --font NotoColorEmoji.ttf

This needs the font, and Pillow with Raqm, which joins the sequences. The sheets are in the repository, so nothing else
needs them.
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from fairref.bundle.judges import PEOPLE_SHEET
from fairref.errors import UserError
from fairref.files.images import save_png
from fairref.judges.sprites import GENDERS, LOOKS, PLAIN, SPRITE, TONES

THING_TABLE, THING_SHEET = (Path(__file__).with_name(f"things.{kind}") for kind in ("csv", "png"))
THING = 40  # pixels a side of a thing
ROW = 12  # things in a row of their sheet
GLYPH = 136  # the font's bitmap strike, pixels a side
STRIKE = 109  # the font size that selects it

JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
PERSON = {"woman": "\U0001f469", "man": "\U0001f468"}
SIGN = {"woman": "\u2640" + EMOJI_STYLE, "man": "\u2642" + EMOJI_STYLE}
SKIN = {"light": "\U0001f3fb", "medium-light": "\U0001f3fc", "medium": "\U0001f3fd", "dark": "\U0001f3ff"}

# A look of LOOKS is PERSON + SKIN + joiner + object, or (SIGNED) a person sign + SKIN + joiner + gender sign.
# Astronaut, firefighter, detective, guard and turban are left out: too few of their pixels show the gender.
OBJECT = {
    "health_worker": "\u2695" + EMOJI_STYLE,
    "student": "\U0001f393",
    "teacher": "\U0001f3eb",
    "judge": "\u2696" + EMOJI_STYLE,
    "farmer": "\U0001f33e",
    "cook": "\U0001f373",
    "mechanic": "\U0001f527",
    "factory_worker": "\U0001f3ed",
    "office_worker": "\U0001f4bc",
    "scientist": "\U0001f52c",
    "technologist": "\U0001f4bb",
    "singer": "\U0001f3a4",
    "artist": "\U0001f3a8",
    "pilot": "\u2708" + EMOJI_STYLE,
}
SIGNED = {"police_officer": "\U0001f46e", "construction_worker": "\U0001f477"}
# PLAIN is PERSON + SKIN: a head alone, drawn smaller to match the others'
PLAIN_SIZE = 0.75


def sequence(look: str, gender: str, tone: str) -> str:
    """Return the Unicode sequence of one person, e.g. U+1F469 U+1F3FD U+200D U+2708: woman, medium, pilot."""
    if look == PLAIN:
        return PERSON[gender] + SKIN[tone]
    if look in OBJECT:
        return PERSON[gender] + SKIN[tone] + JOINER + OBJECT[look]
    return SIGNED[look] + SKIN[tone] + JOINER + SIGN[gender]


def things() -> dict[str, str]:
    """Return the character of each thing, by name."""
    with THING_TABLE.open(encoding="utf-8", newline="") as file:
        return {
            row["name"]: "".join(chr(int(code, 16)) for code in row["code"].split())
            for row in csv.DictReader(file)
        }


def make_sheet(font_file: str) -> Image.Image:
    """Return people as an RGBA image: a row for each (look, gender), a column for each tone. Raises UserError."""
    cells = [sequence(look, gender, tone) for look in LOOKS for gender in GENDERS for tone in TONES]
    sizes = [PLAIN_SIZE if look == PLAIN else 1.0 for look in LOOKS for _ in range(len(GENDERS) * len(TONES))]
    return _sheet(font_file, cells, SPRITE, len(TONES), sizes)


def make_things(font_file: str) -> Image.Image:
    """Return things as an RGBA image, ROW in a row. Raises UserError."""
    texts = list(things().values())
    return _sheet(font_file, texts, THING, ROW, [1.0] * len(texts))


def _sheet(
    font_file: str, texts: Sequence[str], side: int, columns: int, sizes: Sequence[float]
) -> Image.Image:
    """Return cells of `side` pixels, each with a glyph of a share of that size at the middle of the lower edge."""
    if not features.check("raqm"):
        raise UserError(
            "Pillow was built without Raqm, which joins emoji sequences: install libfribidi and a "
            "Pillow wheel that has it"
        )
    font = ImageFont.truetype(font_file, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    sheet = Image.new("RGBA", (side * columns, side * -(-len(texts) // columns)))
    for n, (text, size) in enumerate(zip(texts, sizes, strict=True)):
        if round(font.getlength(text)) != GLYPH:
            code = " ".join(f"U+{ord(c):X}" for c in text)
            raise UserError(
                f"{font_file} draws {code} {font.getlength(text):.0f} pixels wide, one glyph is {GLYPH}: use a "
                "newer Noto Color Emoji"
            )
        glyph = Image.new("RGBA", (GLYPH, GLYPH))
        ImageDraw.Draw(glyph).text((0, 4), text, font=font, embedded_color=True)
        small = round(side * size)
        sprite = glyph.resize((small, small), Image.Resampling.LANCZOS)
        left, top = n % columns * side, n // columns * side
        sheet.paste(sprite, (left + (side - small) // 2, top + side - small))
    return sheet


def write_sheets(font: Path) -> list[Path]:
    """Cut both sheets from the font, write them, and return their files. Raises UserError."""
    for make, path in ((make_sheet, PEOPLE_SHEET), (make_things, THING_SHEET)):
        save_png(make(str(font)), path, {}, optimize=True)
    return [PEOPLE_SHEET, THING_SHEET]
