"""The sprite sheet: every person of the small world, cut once from Noto Color Emoji (OFL-1.1).

    python -m fairref.emoji.sheet --font NotoColorEmoji.ttf

needs the font and Pillow with Raqm (which joins the sequences); the sheet is committed, so nobody else does.
"""

import argparse
from pathlib import Path

from fairref.errors import UserError

SHEET = Path(__file__).with_name("sheet.png")
SPRITE = 80      # pixels a side
GLYPH = 136      # the font's bitmap strike, pixels a side
STRIKE = 109     # the font size that selects it

JOINER, EMOJI_STYLE = "\u200d", "\ufe0f"
PERSON = {"woman": "\U0001F469", "man": "\U0001F468"}
SIGN = {"woman": "\u2640" + EMOJI_STYLE, "man": "\u2642" + EMOJI_STYLE}
SKIN = {"light": "\U0001F3FB", "medium-light": "\U0001F3FC", "medium": "\U0001F3FD", "dark": "\U0001F3FF"}

# A look is PERSON + SKIN + joiner + object, or (the last two) a person sign + SKIN + joiner + gender sign.
# Left out, because their gender cue covers too few pixels: astronaut, firefighter, detective, guard, turban.
OBJECT = {
    "health_worker": "\u2695" + EMOJI_STYLE, "student": "\U0001F393", "teacher": "\U0001F3EB",
    "judge": "\u2696" + EMOJI_STYLE, "farmer": "\U0001F33E", "cook": "\U0001F373", "mechanic": "\U0001F527",
    "factory_worker": "\U0001F3ED", "office_worker": "\U0001F4BC", "scientist": "\U0001F52C",
    "technologist": "\U0001F4BB", "singer": "\U0001F3A4", "artist": "\U0001F3A8", "pilot": "\u2708" + EMOJI_STYLE,
}
SIGNED = {"police_officer": "\U0001F46E", "construction_worker": "\U0001F477"}
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
        raise UserError("Pillow was built without Raqm, which joins emoji sequences: install libfribidi and a "
                        "Pillow wheel that has it")
    font = ImageFont.truetype(font_file, STRIKE, layout_engine=ImageFont.Layout.RAQM)
    sheet = Image.new("RGBA", (SPRITE * len(TONES), SPRITE * len(LOOKS) * len(GENDERS)))
    for i, look in enumerate(LOOKS):
        for j, gender in enumerate(GENDERS):
            for k, tone in enumerate(TONES):
                text = sequence(look, gender, tone)
                if round(font.getlength(text)) != GLYPH:
                    raise UserError(f"{font_file} draws {look}, {gender}, {tone} {font.getlength(text):.0f} pixels "
                                    f"wide, one glyph is {GLYPH}: use a newer Noto Color Emoji")
                glyph = Image.new("RGBA", (GLYPH, GLYPH))
                ImageDraw.Draw(glyph).text((0, 4), text, font=font, embedded_color=True)
                sprite = glyph.resize((SPRITE, SPRITE), Image.Resampling.LANCZOS)
                sheet.paste(sprite, (k * SPRITE, (i * len(GENDERS) + j) * SPRITE))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="make the sprite sheet from the font")
    parser.add_argument("--font", required=True, help="NotoColorEmoji.ttf (Debian package fonts-noto-color-emoji)")
    make_sheet(parser.parse_args().font).save(SHEET, optimize=True)
    print(SHEET)
