"""The page in a real browser, as a visitor uses it: type, draw, compare, download, open the link anew."""

import base64
import http.client
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
from browser import Browser, need_browser
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PICTURES = "[...document.querySelectorAll('.fr .one img')].map(i => i.src)"
JOINED = (
    "performance.getEntriesByType('resource').some(e => e.name.includes('queue/join'))"  # it has its place
)
LINK = "document.querySelector('.fr a.view')?.getAttribute('href') ?? ''"
# fairref, in a process that tells whom it tries to reach, and reaches loopback alone
ALONE = """
import socket, sys
real = socket.socket.connect
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
        print("reaches out to", address, flush=True)
        raise OSError("closed")
    return real(self, address)
def lookup(host, *rest, **more):
    if host not in (None, "", "127.0.0.1", "::1", "localhost", b"127.0.0.1"):
        print("reaches out to", host, flush=True)
        raise socket.gaierror("closed")
    return real_lookup(host, *rest, **more)
real_lookup, socket.getaddrinfo, socket.socket.connect = socket.getaddrinfo, lookup, connect
from fairref.__main__ import main
sys.exit(main())
"""
FOCUS = "document.activeElement"
FIELD = "document.querySelector('#prompt textarea, #prompt input')"
STATUS = "document.querySelector('.fr [role=status]')?.innerText"
SIZE = "(r => [r.x, r.y, r.width, r.height])(document.querySelector('{}').getBoundingClientRect())"
COLOURS = """
(e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor])(document.querySelector('{}'))"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server with the small bundle and its own adapter."""
    need_browser()
    pytest.importorskip("gradio", reason='the extra "web" brings it')
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("serve") / "log").open("w+")
    argv = [
        sys.executable,
        "-c",
        ALONE,
        "serve",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--max-waiting",
        "2",
    ]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    ends = time.monotonic() + 600
    while True:
        assert process.poll() is None and time.monotonic() < ends, Path(log.name).read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            break
        except OSError:
            time.sleep(0.2)
    yield address
    process.terminate()
    process.wait()
    said = Path(log.name).read_text()
    assert "reaches out" not in said and "Traceback" not in said


@pytest.fixture(scope="module")
def browser():
    need_browser()
    with Browser() as running:
        yield running


@pytest.fixture
def tab(browser):
    tab = browser.tab(1280)
    yield tab
    tab.close()


def arrive(tab, address):
    tab.go(address)
    tab.wait(f"{PICTURES}.length > 0 && document.querySelector('#prompt textarea, #prompt input')?.value")


def press_until(tab, condition):
    """Tab, until what has the focus is it."""
    for _ in range(60):
        if tab.js(condition):
            return
        tab.key("Tab")
    raise AssertionError(condition)


def ask(tab, prompt, by_enter=False):
    """Writes the prompt into its field and draws, with the keyboard alone."""
    press_until(tab, f"{FOCUS}.id === '' && {FOCUS}.closest('#prompt') !== null")
    tab.js(f"{FOCUS}.select()")
    tab.type(prompt)
    if not by_enter:
        press_until(tab, f"{FOCUS}.innerText === 'Draw'")
    tab.key("Enter")


def drawn(tab, prompt):
    """The pictures of a prompt as soon as they are there."""
    tab.wait(f"decodeURIComponent(({LINK}).replaceAll('+', ' ')).includes({json.dumps(prompt)})")
    return tab.js(PICTURES)


@pytest.mark.slow
def test_from_the_first_visit_to_the_link(server, tab, browser, tmp_path):
    arrive(tab, server)
    example = tab.js(PICTURES)
    assert len(example) == 8  # 4 by each model
    prompt = "a photo of the face of a nurse & a “friend”, 100 % sure"
    ask(tab, prompt)
    pictures = drawn(tab, prompt)
    assert len(pictures) == 8 and pictures != example
    assert "nurse" in tab.wait("location.search")  # the address bar has the link
    with Image.open(io.BytesIO(base64.b64decode(pictures[1].split(",")[1]))) as image:
        assert image.text["prompt"] == prompt and "gender.safetensors" in image.text["settings"]

    # what the judge sees, on request
    assert not tab.js("[...document.querySelectorAll('.fr .told')].some(t => t.offsetHeight)")
    press_until(tab, f"{FOCUS}.closest('#judge') !== null")
    tab.key(" ")
    assert tab.wait("[...document.querySelectorAll('.fr .told')].every(t => t.offsetHeight)")
    assert re.fullmatch(r"(woman|man) \d+%, .*", tab.js("document.querySelector('.fr .told').innerText"))
    box, image = (tab.js(SIZE.format(f".fr .one {what}")) for what in ("svg", "img"))
    assert box == image and image[0] > 60

    # downloads: one picture, and all
    browser.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.js("document.querySelector('.fr .one').click()")
    tab.js("document.querySelector('.fr a[download$=zip]').click()")
    one, whole = tmp_path / "seed0-000-original.png", tmp_path / "seed0.zip"
    ends = time.monotonic() + 60
    while not (one.exists() and whole.exists()):
        assert time.monotonic() < ends
        time.sleep(0.1)
    assert one.read_bytes() == base64.b64decode(pictures[0].split(",")[1])
    with zipfile.ZipFile(whole) as file:
        assert file.read("seed0-003-fair.png") == base64.b64decode(pictures[-1].split(",")[1])

    link = tab.js(LINK)
    anew = browser.tab(390, dark=True)
    anew.go(f"{server}/{link}")
    assert drawn(anew, prompt) == pictures  # byte for byte
    assert anew.js("document.querySelector('#prompt textarea, #prompt input').value") == prompt
    anew.close()
    assert [url for url in tab.requests() if not url.startswith((server, "data:"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_its_window_and_asks_nobody_else(server, browser, width, dark):
    tab = browser.tab(width, dark)
    arrive(tab, server)
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert [url for url in tab.requests() if not url.startswith((server, "data:"))] == []
    assert tab.complaints() == []
    red, green, blue = tab.image().getpixel((2, 2))
    assert max(red, green, blue) < 60 if dark else min(red, green, blue) > 200
    for small in (".fr .told", "#judge", ".fr .links a"):
        assert contrast(*tab.js(COLOURS.format(small))) >= 4.5, small
    tab.close()


def contrast(*colours):
    """WCAG's, of two colours as CSS writes them."""
    light = []
    for colour in colours:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(sum(map(float.__mul__, (0.2126, 0.7152, 0.0722), linear)))
    return (max(light) + 0.05) / (min(light) + 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("query", ["prompt={}&n=1&steps=1", "prompt=a&adapter={}", "prompt=woman+{}&steps=1"])
def test_long_words_stay_in_the_page(server, browser, query):
    tab = browser.tab(390)
    tab.go(f"{server}/?{query.format('W' * 300)}")
    tab.wait("!!document.querySelector('.fr .note, .fr .error')")
    wide = "[...document.querySelectorAll('.fr, .fr p, .fr li')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert tab.js(wide) == 0
    tab.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "query, said",
    [
        ("?prompt=&seed=7", "There is no prompt; write what to draw."),
        ("?prompt=a&n=99&seed=7", "The number of images is 99; expected 1 to 8."),
        ("?prompt=a&adapter=..%2F..%2Fetc%2Fpasswd", "There is no adapter '../../etc/passwd' here"),
        ("?prompt=a&guidance=%3Cscript%3E", "guidance is '<script>'; expected a number."),
    ],
)
def test_a_bad_link_gets_a_sentence(server, tab, query, said):
    tab.go(server + "/" + query)
    assert said in tab.wait("document.querySelector('.fr .error')?.innerText")
    assert tab.js(f"{FIELD}.value") == ("a" if "prompt=a" in query else "")
    assert "seed=7" not in query or tab.js("document.querySelector('input[aria-label=Seed]').value") == "7"


@pytest.mark.slow
@pytest.mark.parametrize("waits", [False, True])
def test_cancel_frees_the_place(server, tab, waits):
    arrive(tab, server)
    cancel = "[...document.querySelectorAll('button')].find(b => b.innerText === 'Cancel')"
    assert tab.js(f"{cancel}.disabled")  # there is nothing to cancel
    visitor = Visitor(server) if waits else None
    tab.go(f"{server}/?prompt=a+long+one&n=8&steps=100")
    tab.wait(JOINED if waits else "!!document.querySelector('.fr .doing')")
    press_until(tab, f"{FOCUS}.innerText === 'Cancel'")
    tab.key("Enter")
    tab.wait(f"{STATUS} === 'Cancelled.'")
    time.sleep(2)  # nothing else is said later
    assert tab.js("document.querySelector('.gradio-container .fr').innerText") == "Cancelled."
    assert tab.js(f"{cancel}.disabled")
    if visitor:
        visitor.leave()
    ask(tab, "a photo of a short one", by_enter=True)
    assert len(drawn(tab, "a photo of a short one")) in (8, 16)


@pytest.mark.slow
def test_while_it_draws_it_takes_no_other_prompt_and_says_so(server, tab):
    arrive(tab, server)
    tab.js("document.querySelector('#judge input').click()")
    tab.js("document.querySelector('#others input').click()")
    ask(tab, "the first thing", by_enter=True)
    tab.wait("!!document.querySelector('.fr .doing')")
    assert tab.js("document.querySelector('#draw').disabled")
    tab.js(f"{FIELD}.select()")
    tab.type("the second thing")
    tab.key("Enter")
    drawn(tab, "the first thing")
    tab.wait("!document.querySelector('#draw').disabled")
    assert tab.js(f"{FIELD}.value") == "the second thing"
    tab.key("Enter")
    drawn(tab, "the second thing")
    # what was asked to be shown still is
    shown = "[...document.querySelectorAll('.fr .told, .fr .others')].every(e => e.offsetHeight)"
    assert tab.js(shown)


class Visitor:
    """Somebody who asks for much through the API, and waits for it."""

    def __init__(self, server):
        self.connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=600)
        body = json.dumps({"data": ["a photo", "", 0, 8, 2.5, 100, "gender", 1.0]})
        self.connection.request("POST", "/gradio_api/call/draw", body, {"Content-Type": "application/json"})
        event = json.loads(self.connection.getresponse().read())["event_id"]
        self.connection.request("GET", f"/gradio_api/call/draw/{event}")
        self.connection.getresponse()

    def leave(self):
        self.connection.close()


@pytest.mark.slow
def test_who_waits_and_who_finds_the_queue_full_are_told(server, tab):
    visitors = [Visitor(server)]
    tab.go(f"{server}/?prompt=a+link+that+waits")
    assert tab.wait(STATUS) == "Waiting for its turn …"
    tab.wait(JOINED)
    visitors.append(Visitor(server))
    other = tab.browser.tab(1280)
    arrive(other, server)  # who only looks takes no place
    ask(other, "one too many")
    assert "The queue is full" in other.wait("document.querySelector('.fr .error')?.innerText")
    other.close()
    for visitor in visitors:
        visitor.leave()
    assert len(drawn(tab, "a link that waits")) == 8


@pytest.mark.slow
def test_a_prompt_that_names_a_class_and_one_that_is_cut_are_said(server, tab):
    arrive(tab, server)
    ask(tab, "a photo of the face of a woman pilot")
    drawn(tab, "woman pilot")
    assert "This prompt names gender (“woman”)" in tab.js("document.querySelector('.fr .note').innerText")


@pytest.mark.slow
@pytest.mark.parametrize(
    "data", [[["a", "b"], "", 0, 1, 2.5, 1, "", 1.0], ["a", "", True, 1, 2.5, 1, "", 1.0], [None] * 8]
)
def test_a_program_that_asks_for_what_can_not_be_gets_a_sentence(server, data):
    event = json.loads(post(server, "call/draw", {"data": data})[1])["event_id"]
    with urllib.request.urlopen(f"{server}/gradio_api/call/draw/{event}", timeout=600) as answer:
        assert re.search(
            r'event: error\ndata: .*"(prompt is|seed is|There is no prompt)', answer.read().decode()
        )


@pytest.mark.slow
def test_no_function_of_the_page_can_be_made_to_fail(server):
    """Whatever a visitor sends to them: a Traceback in the log fails the server's own test."""
    with urllib.request.urlopen(f"{server}/config", timeout=60) as answer:
        functions = json.loads(answer.read())["dependencies"]
    for junk in ("[", {"a": [1]}, 5, None, [["query"]]):
        for function in functions:
            body = {"data": [junk] * len(function["inputs"]), "fn_index": function["id"], "session_hash": "x"}
            status, _ = post(server, "queue/join" if function["queue"] else "run/predict", body)
            assert status in (200, 400, 503), function
    assert post(server, "queue/join", {"data": [], "fn_index": 999, "session_hash": "x"})[0] == 400


def post(server, path, body):
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", f"/gradio_api/{path}", json.dumps(body), headers)
    answer = connection.getresponse()
    try:
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.slow
def test_a_tenth_of_the_load(server):
    """20 of the 200 requests of tests/benchmarks/serving.py, which starts a server of its own."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = ROOT / "tests" / "benchmarks" / "serving.py"
    argv = [sys.executable, script, "--visitors", "5", "--requests", "4", "--every", "4", "--port", str(port)]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.count("ok  ") == 5, done.stdout + done.stderr[-2000:]
