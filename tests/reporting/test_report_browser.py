"""The report in a real browser, without its scripts: it asks for nothing, complains of nothing, and fits its window."""

import re

import pytest
from browser import Browser, need_browser
from report_runs import write_run

from fairref.reporting.report import write_report

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser():
    need_browser()
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports on one run, several, and one that has only begun, with all that is folded laid open."""
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "gender")
    several = [
        one,
        write_run(folder / "unet", "unet.json", "unet"),
        write_run(folder / "all", "concepts.json"),
    ]
    bare = folder / ("x" * 120)
    bare.mkdir()
    (bare / "settings.json").write_bytes((one / "settings.json").read_bytes())
    made = {}
    for name, runs in (("one", [one]), ("several", several), ("bare", [bare])):
        made[name] = write_report(runs, folder / f"{name}.html")
        text = made[name].read_text(encoding="utf-8")
        made[name].write_text(re.sub(r"<details(?! open)", "<details open", text), encoding="utf-8")
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", "several", "bare"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_stands_alone_and_fits(browser, pages, name, width, dark):
    page = browser.open(pages[name], width, dark)
    assert [url for url in page.requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert page.complaints == []
    assert page.width == width and page.height > 2000
    red, green, blue = page.image.getpixel((2, 2))
    assert max(red, green, blue) < 60 if dark else min(red, green, blue) > 200
    colours = page.image.getcolors(page.image.width * page.image.height)
    assert len(colours) > 50  # text and lines on it


@pytest.mark.slow
def test_it_is_white_on_paper_and_nothing_is_folded_there(browser, pages, tmp_path):
    closed = tmp_path / "closed.html"
    text = pages["one"].read_text(encoding="utf-8")
    closed.write_text(text.replace("<details open", "<details"), encoding="utf-8")
    screen = browser.open(closed, 794, dark=True)
    papers = [browser.open(file, 794, dark=True, media="print") for file in (closed, pages["one"])]
    assert papers[0].height == papers[1].height and papers[0].image.getpixel((2, 2)) == (255, 255, 255)
    assert max(screen.image.getpixel((2, 2))) < 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "content, wrong",
    [
        ('<img src="https://example.org/x.png">', "requests"),
        ('<img src="other.png">', "requests"),
        (
            '<meta http-equiv="Content-Security-Policy" content="img-src data:"><img src="x.png">',
            "complaints",
        ),
        ('<p style="width: 2000px">wide</p>', "width"),
    ],
)
def test_the_browser_sees_what_a_page_must_not_do(browser, tmp_path, content, wrong):
    file = tmp_path / "page.html"
    file.write_text(
        f'<!doctype html><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">{content}'
    )
    page = browser.open(file, 390)
    assert (
        len(page.requests) > 1
        if wrong == "requests"
        else page.complaints
        if wrong == "complaints"
        else page.width > 390
    )
