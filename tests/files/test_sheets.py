"""A sheet of images says what it shows at every size: text is inside and apart, a bar is as long as its share."""

from itertools import accumulate, combinations

import pytest
from PIL import Image, ImageColor, ImageDraw

from fairref.files import sheets
from fairref.files.sheets import (
    COLOURS,
    SIDE,
    SIZES,
    Pair,
    enlarged,
    folded,
    font,
    sheet,
    shown,
)

NOTES = [
    "Each prompt: before finetuning above, after (ema) below, from the same noise.",
    "Bars: each class's share of 60 images of the prompt. Black line: where a class ends at the target.",
]
CLASSES = {"gender": ("woman", "man"), "skin_tone": ("light", "medium-light", "medium", "dark")}
TARGETS = [(0.5, 0.5), (0.25, 0.25, 0.25, 0.25)]
LONG = "a photo of the face of a community service manager, a person, " * 9
PROMPTS = [
    "nurse",
    LONG,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft" * 2,
]
GREY = (90, 90, 90)


def pairs_of(prompts, side, n, shares=((), ())):
    images = [enlarged(Image.new("RGB", (side, side), GREY))] * n
    return [Pair(prompt, (images, images), shares) for prompt in prompts]


SHARES = ([[0.9, 0.1], [0.55, 0.25, 0.2, 0.0]], [[0.48, 0.52], [0.3, 0.25, 0.25, 0.2]])


@pytest.fixture
def texts(monkeypatch):
    """All text that is written, with the box of its ink."""
    written, text_of = [], ImageDraw.ImageDraw.text

    def text(pen, at, text, fill=None, font=None, anchor=None):
        box = font.getbbox(text, anchor=anchor)
        written.append((text, tuple(at[i % 2] + edge for i, edge in enumerate(box))))
        text_of(pen, at, text, fill, font, anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return written


def apart(a, b):
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("side, n", [(32, 6), (64, 12), (512, 3)])
@pytest.mark.parametrize("bars", [False, True])
def test_all_text_is_inside_and_nothing_overlaps(texts, side, n, bars):
    pairs = pairs_of(PROMPTS, side, n, SHARES if bars else ((), ()))
    image, layout = sheet(pairs, NOTES, CLASSES, TARGETS if bars else None)
    assert image.size == (layout.width, layout.height(len(pairs)))
    boxes = [box for text, box in texts if text]
    for text, (left, top, right, bottom) in texts:
        assert left >= 0 and top >= 0 and right <= image.width and bottom <= image.height, text
    for (a, box_a), (b, box_b) in combinations(texts, 2):
        assert apart(box_a, box_b), (a, b)
    (width, height), P = layout.cell, range(len(pairs))
    corners = [layout.image(p, r, i) for p in P for r in range(2) for i in range(n)]
    for left, top in corners:
        assert all(apart(box, (left, top, left + width, top + height)) for box in boxes)
        assert image.getpixel((left, top)) == image.getpixel((left + width - 1, top + height - 1)) == GREY
    # text as large as a picture asks for
    assert layout.size >= 0.2 * width and font(layout.size).getbbox("M")[3] >= 12


@pytest.mark.parametrize("side", [32, 64, 512])
def test_what_a_prompt_is_and_which_row_is_which_stands_left_of_its_images(texts, side):
    image, layout = sheet(pairs_of(PROMPTS, side, 3), NOTES, CLASSES)
    for name in ("before", "after"):
        middles = [(box[1] + box[3]) / 2 for text, box in texts if text == name]
        rows = [layout.row(p, name == "after") for p in range(len(PROMPTS))]
        for middle, top in zip(middles, rows, strict=True):
            assert abs(middle - top - layout.cell[1] / 2) < layout.size
    for p, prompt in enumerate(PROMPTS):
        top, bottom = layout.row(p, 0), layout.row(p, 1) + layout.cell[1]
        beside = [
            text
            for text, box in texts
            if top <= box[1] < bottom and box[2] <= layout.margin + layout.prompt_width + 2
        ]
        whole = "".join(beside).replace(" ", "")
        expected = shown(prompt).replace(" ", "")
        assert whole == expected if prompt == "nurse" else expected.startswith(whole.removesuffix("…"))
    assert beside and not whole.endswith("…")  # a long word is folded
    # the pixels are there too
    label = image.crop((0, layout.row(0, 0), layout.left, layout.row(0, 1) + layout.cell[1]))
    plain, _ = sheet(pairs_of([" ", *PROMPTS[1:]], side, 3), NOTES, CLASSES)
    assert label.tobytes() != plain.crop((0, layout.row(0, 0), layout.left, layout.row(1, 0))).tobytes()


@pytest.mark.parametrize("side", [64, 512])
@pytest.mark.parametrize(
    "shares, target",
    [
        ([1.0, 0.0], (0.5, 0.5)),
        ([0.0, 1.0], (0.5, 0.5)),
        ([0.65, 0.35], (0.75, 0.25)),
        ([0.3, 0.7], (1.0, 0.0)),
        ([0.3, 0.5, 0.1, 0.1], (0.7, 0.2, 0.1, 0.0)),  # 0.7 + 0.2 + 0.1 < 1 in float64
        ([0.3, 0.2, 0.1, 0.4], (0.25, 0.25, 0.25, 0.25)),
        ([1 / 9] * 9, (1 / 9,) * 9),
    ],
)
def test_a_bar_is_as_long_as_its_share_and_the_target_is_a_line(texts, side, shares, target):
    classes = {"a": tuple("abcdefghi"[: len(shares)])}
    image, layout = sheet(pairs_of(["x"], side, 2, ([shares], [shares[::-1]])), NOTES, classes, [target])
    width = layout.bar_width
    marks = [mark for mark in list(accumulate(target))[:-1] if mark < 0.99]
    thin = max(1, layout.cell[0] // 64)
    for r, of_row in enumerate((shares, shares[::-1])):
        left, top, right, bottom = layout.bar(0, r, 0)
        assert right - left == width and right < image.width
        pixels = [image.getpixel((x, top)) for x in range(left, right)]
        lines = [x for x, pixel in enumerate(pixels) if pixel == (0, 0, 0)]
        assert len(lines) == thin * len(marks)
        for mark in marks:
            assert sum(abs(x - mark * width) <= thin / 2 + 1 for x in lines) == thin
        edges = list(accumulate(of_row, initial=0))
        for x, pixel in enumerate(pixels):
            if x not in lines:
                near = [
                    k for k in range(len(of_row)) if edges[k] * width - 1 <= x <= edges[k + 1] * width + 1
                ]
                assert pixel in [ImageColor.getrgb(COLOURS[k % len(COLOURS)]) for k in near], x
        # each number is that of its class, inside the bar and beside the lines
        numbers = [(text, box) for text, box in texts if text.endswith("%") and top <= box[1] < bottom]
        for text, box in numbers:
            assert left <= box[0] and box[2] <= right and box[3] <= bottom
            (k,) = [
                k
                for k in range(len(of_row))
                if edges[k] * width <= (box[0] + box[2]) / 2 - left <= edges[k + 1] * width
            ]
            assert text == f"{of_row[k]:.0%}"
            assert not any(box[0] - left <= x <= box[2] - left for x in lines)
        if len(of_row) == 2:
            assert {f"{share:.0%}" for share in of_row if share > 0.2} == {text for text, _ in numbers}


def test_who_was_not_counted_has_an_empty_bar(texts):
    image, layout = sheet(
        pairs_of(["x"], 64, 2, ([[]], [[0.5, 0.5]])), NOTES, {"gender": ("f", "m")}, [(0.3, 0.7)]
    )
    left, top, right, bottom = layout.bar(0, 0, 0)
    inside = image.crop((left + 1, top + 1, right - 1, bottom - 1)).convert("RGB")
    seen = {colour for _, colour in inside.getcolors(10000)}
    assert all(red == green == blue for red, green, blue in seen)  # no class's colour
    assert "none" in [text for text, _ in texts]


def test_the_key_shows_each_class_beside_its_colour(texts):
    many = {"age": tuple(f"{a} to {a + 9} years" for a in range(0, 90, 10)), "gender": ("woman", "man")}
    shares = [[1 / 9] * 9, [0.5, 0.5]]
    image, layout = sheet(
        pairs_of(["x"], 64, 2, (shares, shares)), NOTES, many, [tuple(of_one) for of_one in shares]
    )
    for a, names in enumerate(many.values()):
        for k, name in enumerate(names):
            ((_, box),) = [(text, box) for text, box in texts if text == name]
            assert layout.column(a) < box[0] and box[2] <= layout.column(a) + layout.bar_width
            assert box[3] < layout.head
            x, y = round(box[0] - 0.6 * layout.size), round((box[1] + box[3]) / 2)
            assert image.getpixel((x, y)) == ImageColor.getrgb(COLOURS[k % len(COLOURS)])
    said = " ".join(text for text, box in texts if box[3] < layout.head and box[2] < layout.right)
    assert all(note in said for note in NOTES)


@pytest.mark.parametrize(
    "text, instead",
    [
        ("élève — façade", "eleve - facade"),
        ("Straße\n\tim  Süden", "Strasse im Suden"),
        ("护士", "prompt 1"),
        ("", "prompt 1"),
        ("\ud800\x00\u200b", "prompt 1"),
        ("👩🏽‍✈️", "prompt 1"),
        ("a\x00 b\u200b", "a b"),
    ],
)
def test_any_script_is_shown_as_far_as_the_font_goes(text, instead, texts):
    if sheets._in_font("护"):
        pytest.skip("this Pillow's font has these letters")
    sheet(pairs_of([text], 64, 1), NOTES, CLASSES)
    beside = " ".join(t for t, _ in texts if t not in ("before", "after"))
    assert beside.endswith(instead)


def test_half_a_text_that_the_font_lacks_keeps_the_other_half():
    assert shown("护士 nurse", "prompt 1").endswith(" nurse")
    sheet(pairs_of(["护士 nurse ясно عربي"], 64, 1), NOTES, CLASSES)


def test_text_is_folded_between_words_and_cut_with_an_ellipsis():
    lines, whole = folded("one two three four", 20, font(20).getlength("one two "), 9)
    assert whole and lines == ["one two", "three", "four"]
    lines, whole = folded(LONG, 20, 150, 4)
    assert not whole and len(lines) == 4 and lines[-1].endswith("…")
    assert all(font(20).getlength(line) <= 150 for line in lines)
    lines, whole = folded("x" * 50, 20, 60, 99)
    assert whole and "".join(lines) == "x" * 50 and max(map(font(20).getlength, lines)) <= 60
    assert folded("", 20, 60, 3) == ([""], True)


def test_a_long_prompt_is_written_smaller_before_it_is_cut(monkeypatch):
    written = []
    monkeypatch.setattr(sheets, "_write", lambda pen, left, top, lines, size: written.append((lines, size)))
    sizes = []
    for count in range(1, 70):
        _, layout = sheet(pairs_of(["word " * count], 64, 1), [], CLASSES)
        lines, size = written[-1]
        words = " ".join(text for line in lines for _, text in line).split()
        assert len(words) == count or size == round(SIZES[-1] * layout.size)
        sizes.append(size)
    assert list(dict.fromkeys(sizes)) == [round(scale * layout.size) for scale in SIZES]
    assert len(words) < 69 and words[-1].endswith("…")


def test_small_images_are_enlarged_by_whole_numbers():
    for side, large in ((32, 96), (64, 128), (96, 96), (100, 100), (512, 512)):
        image = enlarged(Image.new("RGB", (side, side)))
        assert image.size == (large, large) and large >= SIDE
