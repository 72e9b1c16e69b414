"""Sheets of images: each prompt has a row before finetuning and a row after, from the same noise.

The prompt is to the left of its two rows, bars of its class shares are to the right, notes and a key are on top.
P prompts, n images in a row, A attributes, K_a classes of each. All lengths are multiples of an image's side, so that
a sheet of large images looks like a sheet of small ones.
"""

import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from PIL import Image, ImageDraw, ImageFont

SIDE = 96  # pixels that a small image is enlarged to, at least
# Paul Tol's bright scheme, which colour-blind readers can tell apart
COLOURS = ("#ee6677", "#4477aa", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#bbbbbb")
DARK = (COLOURS[1], COLOURS[2], COLOURS[4])  # white text is easier to read on these
ROWS = ("before", "after")
PLAIN = str.maketrans(  # characters that are not in the font; the escapes are typographic quotation marks
    {"ß": "ss", "–": "-", "—": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'}
)
SIZES = (
    1,
    0.8,
    0.65,
)  # of a prompt's text, tried in turn; a prompt is cut only if it is too long for the smallest


@dataclass(frozen=True)
class Pair:
    """The images and class shares of one prompt. All images of all pairs have one size."""

    prompt: str
    images: tuple[list[Image.Image], list[Image.Image]]  # n before, n after
    # before and after, for each attribute: K_a shares with sum 1, or none if no image was counted
    shares: tuple[list[list[float]], list[list[float]]] = ((), ())


@dataclass(frozen=True)
class Layout:
    """The places of everything on a sheet, in pixels."""

    cell: tuple[int, int]  # width and height of an image; the width is the unit of all other lengths
    n: int  # images in a row
    columns: int = 0  # of bars
    head: int = 0  # height of the notes and the key

    @property
    def size(self) -> int:
        """Size of the text."""
        return max(12, round(0.22 * self.cell[0]))

    @property
    def gap(self) -> int:
        """Distance between images of a pair."""
        return max(2, self.cell[0] // 48)

    @property
    def margin(self) -> int:
        """Distance between all other things, and to the edges."""
        return max(6, self.cell[0] // 12)

    @property
    def prompt_width(self) -> int:
        """Width of the column of prompts."""
        return round(1.7 * self.cell[0])

    @property
    def left(self) -> int:
        """Left edge of the images, behind the prompts and the names of the rows."""
        names = max(font(self.size).getlength(name) for name in ROWS)
        return 3 * self.margin + self.prompt_width + round(names)

    @property
    def right(self) -> int:
        """Right edge of the images."""
        return self.left + self.n * (self.cell[0] + self.gap) - self.gap

    @property
    def bar_width(self) -> int:
        """Width of a bar of class shares."""
        return round((2.6 if self.columns == 1 else 2) * self.cell[0])

    @property
    def width(self) -> int:
        """Width of the sheet."""
        return self.column(self.columns) if self.columns else self.right + self.margin

    def height(self, P: int) -> int:
        """Return the height of a sheet of P prompts."""
        return self.row(P, 0)

    def row(self, p: int, r: int) -> int:
        """Return the top of row r of prompt p."""
        return self.head + p * (2 * self.cell[1] + self.gap + self.margin) + r * (self.cell[1] + self.gap)

    def image(self, p: int, r: int, i: int) -> tuple[int, int]:
        """Return left and top of image i in row r of prompt p."""
        return self.left + i * (self.cell[0] + self.gap), self.row(p, r)

    def column(self, a: int) -> int:
        """Return the left edge of the bars of attribute a."""
        return self.right + 2 * self.margin + a * (self.bar_width + 2 * self.margin)

    def bar(self, p: int, r: int, a: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of a bar; right and bottom are outside."""
        height = self.cell[0] // 2
        top = self.row(p, r) + (self.cell[1] - height) // 2
        return self.column(a), top, self.column(a) + self.bar_width, top + height


def sheet(
    pairs: list[Pair],
    notes: list[str],
    classes: dict[str, tuple[str, ...]],
    targets: list[tuple[float, ...]] | None = None,
) -> tuple[Image.Image, Layout]:
    """Return the sheet of P prompts, with notes and a key of the classes' colours on top.

    `targets`: K_a shares for each attribute. With them there is a column of bars for each attribute, under its key.
    """
    columns = 0 if targets is None else len(classes)
    layout = Layout(pairs[0].images[0][0].size, len(pairs[0].images[0]), columns)
    room, size = layout.right - layout.margin, layout.size
    words = [[(None, line)] for note in notes for line in folded(shown(note), size, room, len(note))[0]]
    width = layout.bar_width if columns else room
    keys = [_key(attribute, names, size, width) for attribute, names in classes.items()]
    # left edge and lines of each block on top
    blocks = [(layout.margin, words), *((layout.column(a), key) for a, key in enumerate(keys))]
    if not columns:
        blocks = [(layout.margin, [*words, *(line for key in keys for line in key)])]
    lines = max(len(block) for _, block in blocks)
    layout = replace(layout, head=2 * layout.margin + lines * _line_height(size))
    image = Image.new("RGB", (layout.width, layout.height(len(pairs))), "white")
    pen = ImageDraw.Draw(image)
    for left, block in blocks:
        _write(pen, left, layout.margin, block, size)
    for p, pair in enumerate(pairs):
        _draw_prompt(pen, layout, p, shown(pair.prompt, f"prompt {p + 1}"))
        for r, row in enumerate(pair.images):
            for i, cell in enumerate(row):
                image.paste(cell, layout.image(p, r, i))
        for a, target in enumerate(targets or ()):
            # the target's boundaries between classes; the sum of all shares may miss 1 by its last digit
            marks = [mark for mark in list(accumulate(target))[:-1] if 1e-6 < mark < 1 - 1e-6]
            for r, shares in enumerate(pair.shares):
                _draw_bar(pen, layout.bar(p, r, a), shares[a], marks, size)
            _draw_target(pen, layout, p, a, marks)
    return image, layout


def enlarged(image: Image.Image) -> Image.Image:
    """Return a small image enlarged by a whole number, to SIDE pixels or more."""
    scale = max(1, -(-SIDE // image.height))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return Pillow's own font, which has hardly more than ASCII."""
    return ImageFont.load_default(size=size)


def shown(text: str, instead: str = "?") -> str:
    """Return a text in one line, as the font can show it; `instead` if the font has none of its letters.

    Letters lose their accents. A character that the font does not have becomes a box.
    """
    text = unicodedata.normalize("NFKD", " ".join(text.split()).translate(PLAIN))
    # Mn, Me: accents; Cc, Cf, Cs: characters that show nothing
    text = "".join(c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cc", "Cf", "Cs"))
    letters = [c for c in text if c.isalnum()]
    return text if any(map(_in_font, letters)) else instead


@cache
def _in_font(character: str) -> bool:
    box, drawn = (bytes(font(24).getmask(c)) for c in ("\uffff", character))
    return drawn != box


def folded(text: str, size: int, width: float, max_lines: int) -> tuple[list[str], bool]:
    """Return a text in lines of `width` pixels, and whether that is all of it; if not, it ends with an ellipsis.

    A line ends between words. Only a word that is wider than a line is broken.
    """
    length, lines = font(size).getlength, [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if length(longer) <= width:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for character in word:
            if lines[-1] and length(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) <= max_lines:
        return lines, True
    last = lines[max_lines - 1]
    while last and length(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], f"{last}…"], False


def _line_height(size):
    return round(1.3 * size)


def _key(attribute, names, size, width):
    """Return lines with an attribute's name and its classes: lists of (colour of a square or None, text)."""
    entries = [(None, f"{attribute}:"), *((COLOURS[k % len(COLOURS)], name) for k, name in enumerate(names))]
    lines, left = [[]], 0
    for colour, text in entries:
        text = folded(shown(text), size, width - size, 1)[0][0]
        if lines[-1] and left + _entry_width(colour, text, size) > width:
            lines, left = [*lines, []], 0
        lines[-1].append((colour, text))
        left += _entry_width(colour, text, size) + size // 2
    return lines


def _entry_width(colour, text, size):
    return font(size).getlength(text) + (0 if colour is None else size)


def _write(pen, left, top, lines, size):
    for line in lines:
        x = left
        for colour, text in line:
            if colour is not None:
                y = top + size // 4
                pen.rectangle([x, y, x + round(0.7 * size), y + round(0.7 * size)], fill=colour)
            pen.text((x + (0 if colour is None else size), top), text, fill="black", font=font(size))
            x += _entry_width(colour, text, size) + size // 2
        top += _line_height(size)


def _draw_prompt(pen, layout, p, prompt):
    """Draw the prompt at half the height of its rows, and the rows' names."""
    height = 2 * layout.cell[1] + layout.gap
    for scale in SIZES:
        size = round(scale * layout.size)
        lines, whole = folded(prompt, size, layout.prompt_width, height // _line_height(size))
        if whole:
            break
    top = layout.row(p, 0) + (height - len(lines) * _line_height(size)) // 2
    _write(pen, layout.margin, top, [[(None, line)] for line in lines], size)
    for r, name in enumerate(ROWS):
        middle = layout.row(p, r) + layout.cell[1] // 2
        pen.text((layout.left - layout.margin, middle), name, "black", font(layout.size), "rm")


def _draw_bar(pen, box, shares, marks, size):
    """Draw the classes' shares side by side, with per cent if there is room beside the marks."""
    left, top, right, bottom = box
    width, size = right - left, round(0.8 * size)
    edges = [left + round(share * width) for share in accumulate(shares, initial=0)]
    pieces = [
        (*edges[k : k + 2], COLOURS[k % len(COLOURS)], f"{share:.0%}") for k, share in enumerate(shares)
    ]
    for k, (start, end, colour, text) in enumerate(pieces or [(left, right, "white", "none")]):
        if start == end:
            continue
        pen.rectangle([start, top, end - 1, bottom - 1], fill=colour, outline=None if pieces else "#bbbbbb")
        half = font(size).getlength(text) / 2 + size / 4
        # the first and the last class at the bar's ends, so that their numbers stand in columns
        places = [start + half, (start + end) / 2, end - half]
        places = places if k == 0 else places[::-1] if k == len(pieces) - 1 else [places[1], *places[::2]]
        for middle in places:
            free = all(abs(left + mark * width - middle) > half for mark in marks)
            if free and end - start >= 2 * half:
                ink = "white" if colour in DARK else "black"
                pen.text((middle, (top + bottom) / 2), text, ink, font(size), "mm")
                break


def _draw_target(pen, layout, p, a, marks):
    """Draw a thin line through the bars of both rows at each of the target's boundaries between classes."""
    left, top, right, _ = layout.bar(p, 0, a)
    bottom, width = layout.bar(p, 1, a)[3], max(1, layout.cell[0] // 64)
    for mark in marks:
        x, over = left + round(mark * (right - left)), layout.margin
        pen.rectangle(
            [x - width // 2, top - over, x - width // 2 + width - 1, bottom + over - 1], fill="black"
        )
