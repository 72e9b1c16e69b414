"""The sprite sheet: every person of the small world, cut once from Noto Color Emoji (OFL-1.1).

    python -m fairref.emoji.sheet --font NotoColorEmoji.ttf

needs the font and Pillow with Raqm (which joins the sequences); the sheet is committed, so nobody else does.
"""

import argparse
from pathlib import Path

from fairref.errors import UserError

SHEET = Path(__file__).with_name("sheet.png")
SPRITE = 80  # pixels a side
GLYPH = 136  # the font's bitmap strike, pixels a side
STRIKE = 109  # the font size that selects it

JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
PERSON = {"woman": "\U0001f469", "man": "\U0001f468"}
SIGN = {"woman": "\u2640" + EMOJI_STYLE, "man": "\u2642" + EMOJI_STYLE}
SKIN = {"light": "\U0001f3fb", "medium-light": "\U0001f3fc", "medium": "\U0001f3fd", "dark": "\U0001f3ff"}

# A look is PERSON + SKIN + joiner + object, or (the last two) a person sign + SKIN + joiner + gender sign.
# Left out, because their gender cue covers too few pixels: astronaut, firefighter, detective, guard, turban.
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
LOOKS = (*OBJECT, *SIGNED)
GENDERS = tuple(PERSON)
TONES = tuple(SKIN)


def sequence(look: str, gender: str, tone: str) -> str:
    """The Unicode sequence of one person, e.g. U+1F469 U+1F3FD U+200D U+2708: woman, medium, pilot."""
    if look in OBJECT:
        return PERSON[gender] + SKIN[tone] + JOINER + OBJECT[look]
    return SIGNED[look] + SKIN[tone] + JOINER + SIGN[gender]


def make_sheet(font_file: str):
    """The sheet as a PIL RGBA image: a row for each (look, gender), a column for each tone."""
    from PIL import Image, ImageDraw, ImageFont, features

    if not features.check("raqm"):
        raise UserError(
            "Pillow was built without Raqm, which joins emoji sequences: install libfribidi and a "
            "Pillow wheel that has it"
        )
    font = ImageFont.truetype(font_file, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    sheet = Image.new("RGBA", (SPRITE * len(TONES), SPRITE * len(LOOKS) * len(GENDERS)))
    for i, look in enumerate(LOOKS):
        for j, gender in enumerate(GENDERS):
            for k, tone in enumerate(TONES):
                text = sequence(look, gender, tone)
                if round(font.getlength(text)) != GLYPH:
                    raise UserError(
                        f"{font_file} draws {look}, {gender}, {tone} {font.getlength(text):.0f} pixels "
                        f"wide, one glyph is {GLYPH}: use a newer Noto Color Emoji"
                    )
                glyph = Image.new("RGBA", (GLYPH, GLYPH))
                ImageDraw.Draw(glyph).text((0, 4), text, font=font, embedded_color=True)
                sprite = glyph.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
                sheet.paste(sprite, (k * SPRITE, (i * len(GENDERS) + j) * SPRITE))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make the sprite sheet from the font")
    parser.add_argument(
        "--font", required=True, help="NotoColorEmoji.ttf (Debian package fonts-noto-color-emoji)"
    )
    make_sheet(parser.parse_args().font).save(SHEET, optimize=True)
    print(SHEET)
