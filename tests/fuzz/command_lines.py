"""Random command lines for every command, made from its own parser: none may end in a traceback or hang.

    python -m tests.fuzz.command_lines --cases 500 --seed 0

All run in one process. What would be long work, such as a million iterations, is interrupted as by Ctrl-C after a
few steps; what is slow before that, or does not end then, is a fault. Case i depends on (seed, i) only: --first i
--cases 1 runs it again.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_bundle import write_tiny_bundle  # noqa: E402

from fairref import __main__ as console  # noqa: E402
from fairref.commands import cli  # noqa: E402

CODES = {0, 1, 2, 130}
SECONDS = 20  # in which a case must have ended
MEMORY = 8 * 2**30  # bytes that a case may ask for on top of what is in use
STEPS = 3  # pieces of long work after which a case is interrupted
SLOW = {"--compile", "--no-compile"}  # minutes of a compiler's time
NUMBERS = [
    *[
        "-1",
        "0",
        "1",
        "2",
        "3",
        "0.5",
        "-0.0",
        "1e-320",
        "1e300",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "0x10",
        "65537",
        "2147483648",
        "4294967296",
        "1_000",
        "٣",
    ],
    *("1" + "0" * 30, "9" * 5000),
]
TEXTS = [
    *(
        "",
        " ",
        "x" * 300,
        "x" * 5000,
        "\u65e5\u672c \u202e \xe9",
        "caf\udce9",
        "a\nb",
        "\t",
        "%s %d",
        "a {occupation}",
    ),
    *[
        "abc",
        "--",
        "-",
        "=",
        ",",
        ":",
        "{}",
        "{0}",
        "{occupation:>9999999999}",
        "1:2",
        "2:1",
        "1:2:3",
        "none",
        "both",
        "exact",
        "cpu",
        "cuda",
        "cuda:-1",
        "meta",
    ],
    *(
        "cuda:" + "9" * 30,
        "occupations,sports",
        "gender",
        "gender,gender",
        "gender,skin_tone",
        "gender=0.3,0.7",
    ),
    *[
        "gender=",
        "gender=nan,1",
        "gender=1e999,0",
        "gender=0.2",
        "own.py:loss",
        "own.py:loss=nan",
        "own.py:loss=1e300",
    ],
    *["own.py:nothing", "binary.py:loss", "finetune=own.py:judge", "dino=own.py:loss", "nobody=own.py:loss"],
    *["evaluate=clip:gender=a woman|a man", "finetune=clip:hat=a|b", "evaluate=clip:=", "dino=clip:hat=a|b"],
]
PATHS = [
    *[
        ".",
        "..",
        "~",
        "~nobody/x",
        "no/such/file",
        "empty",
        "empty.txt",
        "empty.json",
        "deep.json",
        "binary",
        "binary.json",
        "binary.safetensors",
    ],
    *[
        "prompts.txt",
        "target.json",
        "folder",
        "loop",
        "/dev/null",
        "/dev/full",
        "/proc/self/x",
        "tiny",
        "faces",
        "run",
        "images",
        "fairface",
        "new",
    ],
    *("run/adapter.safetensors", "run/settings.json"),
]
VALUES = [*NUMBERS, *TEXTS, *PATHS]
BASES = {  # command -> a command line that works, and is quick; {i} is the case's number
    "train": "--weights tiny --attr gender --iterations 1 --steps 2 --evaluate none --device cpu --out out{i}",
    "sample": "pilot --weights tiny -n 1 --steps 2 --device cpu --out out{i}",
    "evaluate": "--weights tiny -n 1 --steps 2 --explicit-images 1 --device cpu --cache kept --out out{i}.json",
    "verify": "--json out{i}.json",
    "figures": "7 8 --weights tiny -n 1 --steps 2 --device cpu --out out{i}",
    "report": "run --out out{i}.html",
    "balance": "run --weights tiny --device cpu",
    "plan": "--classes 8 --prompts 50 --half-width .03",
    "serve": "--weights tiny --adapter run --device cpu --max-images 4",
    "bundle": "check tiny",
    "export": "run --to kohya --weights tiny --out out{i}",
    "import": "kohya/fairref-gender.safetensors --weights tiny --out out{i}.safetensors",
    "classifier": "--data fairface --root fairface --attr gender --kind small --width 0.25 --input-size 32 --epochs 1"
    " --batch 2 --device cpu --out out{i}",
    "faces": "--images images --weights faces --device cpu --out out{i}.safetensors",
    "emoji": "check --out faces --work out{i}",
}
OWN = """
def loss(x, o, prompt, bundle):
    return x.square().mean((1, 2, 3))

def judge(device, dtype):
    def look(x):
        return {"gender": x.mean((2, 3))[:, :2]}
    look.classes = {"gender": ("woman", "man")}
    return look
"""


def prepare() -> None:
    """Writes what the values name into the current folder."""
    write_tiny_bundle("tiny", validate_every=0, grid_every=0)
    write_tiny_bundle("faces", faces=True, validate_every=0, grid_every=0)
    for name in ("folder", "images", "fairface"):
        Path(name).mkdir()
    for name in ("empty", "empty.txt", "empty.json", "images/empty.png"):
        Path(name).touch()
    noise = random.Random(0).randbytes(1000)
    for name in ("binary", "binary.py", "binary.json", "binary.safetensors", "images/binary.jpg"):
        Path(name).write_bytes(noise)
    Path("loop").symlink_to("loop")
    Path("own.py").write_text(OWN)
    Path("deep.json").write_text("[" * 100_000)
    Path("prompts.txt").write_text("a pilot\na nurse\n")
    Path("target.json").write_text(
        json.dumps({"attributes": ["gender"], "shares": {"woman": 0.4, "man": 0.6}})
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("images/a.png")
    for part in ("train", "val"):
        Path("fairface", part).mkdir()
        rows = ["file,age,gender,race,service_test"]
        for n in range(4):
            Image.fromarray(pixels).save(f"fairface/{part}/{n}.jpg")
            rows.append(f"{part}/{n}.jpg,20-29,{('Male', 'Female')[n % 2]},{('White', 'Black')[n // 2]},True")
        Path(f"fairface/fairface_label_{part}.csv").write_text("\n".join(rows) + "\n")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        for name, out in (("train", "run"), ("export", "kohya")):
            code = console.main([name, *BASES[name].replace("out{i}", out).split()])
            assert code == 0, said.getvalue()


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Command -> its own parser."""

    class Asked(BaseException):
        pass

    def ask(parser, args=None, namespace=None):
        raise Asked(parser)

    found = {}
    with patch.object(cli.Parser, "parse_args", ask):
        for name in console.COMMANDS:
            try:
                console.main([name])
            except Asked as asked:
                (found[name],) = asked.args
    return found


def command_line(of: dict[str, argparse.ArgumentParser], seed: int, i: int) -> list[str]:
    """Case i: the working command line with one to three options changed, repeated, added or left out."""
    draw = random.Random(f"{seed} {i}")
    name = draw.choice([*of, "train", "sample", "evaluate"])
    argv = BASES[name].replace("{i}", str(i)).split()
    actions = [a for a in of[name]._actions if not SLOW & {*a.option_strings}]
    if draw.random() < 0.95:
        actions = [action for action in actions if action.dest != "help"]
    for action in draw.choices(actions, k=draw.choice((1, 1, 2, 2, 3))):
        taken = [value for value in VALUES if takes(action, value)] or list(action.choices or ())
        value = draw.choice(taken if taken and draw.random() < 0.7 else VALUES)
        option = draw.choice(action.option_strings) if action.option_strings else None
        if option is None:
            argv[0] = value
            if draw.random() < 0.2:
                argv.insert(draw.randrange(len(argv) + 1), draw.choice(VALUES))
        elif action.nargs == 0 or "--no-" in option or type(action) is argparse.BooleanOptionalAction:
            argv.append(option if draw.random() < 0.9 else f"{option}={value}")
        else:
            argv += [f"{option}={value}"] if draw.random() < 0.5 else [option, value]
    if draw.random() < 0.1:
        del argv[draw.randrange(len(argv))]
    return [name, *argv]


def takes(action: argparse.Action, value: str) -> bool:
    """Whether the parser has nothing against an option's value; what comes later may."""
    try:
        value = (action.type or str)(value)
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        return False
    return action.choices is None or value in action.choices


class Hang(BaseException):
    """A case has not ended in time."""


def interrupt_after(function: object, steps: int = STEPS) -> object:
    """The function, which is interrupted as by Ctrl-C once it was called so many times."""
    calls = []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return function(*args, **options)

    return counted


@contextlib.contextmanager
def little_work() -> Iterator[None]:
    """Long work ends soon: iterations, images, checks, figures, epochs, the build of the small world."""
    from fairref.commands import emoji, verify
    from fairref.generation import drawing, sampling
    from fairref.reporting import figures
    from fairref.tools import balance, classifier
    from fairref.training import loop
    from fairref.web import server

    with contextlib.ExitStack() as stack:
        for place, name, function in (
            (server, "application", lambda *args: None),
            (server, "run", lambda *args: None),
            (loop, "iterate", interrupt_after(loop.iterate)),
            (sampling, "draw", interrupt_after(sampling.draw)),
            (drawing, "draw", interrupt_after(drawing.draw, 4 * STEPS)),
            (balance, "measure", interrupt_after(balance.measure)),
            (classifier, "load", interrupt_after(classifier.load, 40)),
            (verify, "verify", lambda shown: []),
            (figures, "descent", interrupt_after(None, 0)),
            (figures, "scales", interrupt_after(None, 0)),
            (emoji.build, "train", interrupt_after(None, 0)),
            (emoji.check, "check", lambda path: 0),
            (emoji.sheet, "write_sheets", lambda font: []),
        ):
            stack.enter_context(patch.object(place, name, function))
        yield


def fault_of(argv: Sequence[str]) -> tuple[int | None, str | None]:
    """The exit code of a command line, and what is wrong with how it ended, if anything is."""

    def late(number, frame):
        raise Hang

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(
        4 * SECONDS, exit=True
    )  # where a library does not let the alarm through
    code = None
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
        little_work(),
    ):
        try:
            code = console.main(argv)
        except SystemExit as end:
            code = end.code
        except Hang:
            return None, f"has not ended after {SECONDS} s, in {traceback.format_exc(limit=-3)}"
        except BaseException:
            return None, traceback.format_exc()
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
    text = said.getvalue()
    last = text.strip().splitlines()[-1:] or [""]
    if code not in CODES:
        return code, f"ends with {code}"
    if "Traceback" in text or "a defect of fairref" in text:
        return code, text[-2000:]
    if code == 2 and not last[0].endswith("."):
        return code, f"ends with {last[0][-300:]!r}, which is no sentence"
    if code == 2 and "your own code ends with" in text and "own.py" not in text:
        return code, text[-2000:]
    return code, None


def run(cases: int, seed: int, first: int = 0, shown: bool = False) -> dict[int, tuple[list[str], str]]:
    """The faults of cases first, first + 1, ...: number -> (command line, what is wrong), and a printed summary."""
    faults, codes, slowest = {}, Counter(), (0.0, 0)
    before = Path.cwd()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, {"HOME": folder}):
        os.chdir(folder)
        try:
            prepare()
            of = parsers()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
            for i in range(first, first + cases):
                argv = command_line(of, seed, i)
                began = time.monotonic()
                code, fault = fault_of(argv)
                slowest = max(slowest, (time.monotonic() - began, i))
                codes[argv[0], code] += 1
                if fault:
                    faults[i] = argv, fault
                if shown:
                    print(i, code, [word[:80] for word in argv], fault or "", flush=True)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
            os.chdir(before)
    for (name, code), count in sorted(codes.items(), key=str):
        print(f"{name:12} {code!s:5} {count}")
    print(f"{cases} command lines, {len(faults)} faults; the slowest, {slowest[1]}, took {slowest[0]:.1f} s")
    return faults


def main() -> int:
    """Prints a summary and the faults; exit code 1 where there are some."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("--cases", 500), ("--seed", 0), ("--first", 0)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--shown", action="store_true", help="print each case")
    options = parser.parse_args()
    faults = run(options.cases, options.seed, options.first, options.shown)
    for i, (argv, fault) in faults.items():
        print(f"\ncase {i}: {[word[:200] for word in argv]}\n{fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
