"""Imports run one way, the core needs six libraries, and the repository holds nothing of one machine."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"torch", "numpy", "scipy", "PIL", "safetensors", "tokenizers"}
EXTRAS = (
    "pytest",
    "diffusers",
    "transformers",
    "open_clip",
    "torchvision",
    "skimage",
    "ot",
    "matplotlib",
    "tensorboard",
    "ruff",
)
MEGABYTE = 2**20
LONGEST_FUNCTION = 60  # lines

# From the roof down. A file imports from its own row or from rows below it. A room stands for all of its
# files but those that have an entry of their own.
ROWS = (
    ("train", "sample"),
    ("fairref.emoji.build", "fairref.emoji.check"),  # remake and measure the default bundle, with every tool
    ("fairref.run",),
    ("fairref.verify",),
    ("fairref.checks",),
    ("fairref.evaluate", "fairref.study", "fairref.train_classifier", "fairref.face_features"),
    ("fairref.generate",),
    ("fairref.report",),
    ("fairref.emoji",),
    ("fairref.finetune",),
    ("fairref.inventory",),
    ("fairref.bundle",),
    ("fairref.judge_files",),  # a judge's folder or file -> a ready judge
    ("fairref.fairness",),
    ("fairref.diffusion",),
    ("fairref.nets",),
    ("fairref.judges",),
    (
        "fairref.tokenizer",
        "fairref.prompts",
        "fairref.datasets",
        "fairref.weights_io",
        "fairref.figures",
        "fairref.images",
        "fairref.cli",
        "fairref.progress",
    ),
    ("fairref.weights_names",),  # other layouts' names
    ("fairref",),  # the package's own file: its version
    ("fairref.errors",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
# Imports inside functions that go up, each with its reason.
UPWARD = {
    ("fairref", "fairref.bundle"): "load_bundle is offered by `import fairref`, which must not import torch",
    ("fairref.bundle", "fairref.inventory"): "only where it is started as python -m fairref.bundle",
    ("fairref.bundle", "fairref.emoji.templates"): "only a bundle of the small world has that judge",
}
# DESIGN.md: who knows what. Each file of the room must not import, anywhere, what is named.
UNKNOWN = {
    "fairref.nets": (
        "fairref.weights_io",
        "fairref.tokenizer",
        "fairref.prompts",
        "fairref.fairness",
        "pathlib",
    ),
    "fairref.judges": (
        "fairref.weights_io",
        "fairref.tokenizer",
        "fairref.prompts",
        "fairref.fairness",
        "fairref.diffusion",
        "pathlib",
    ),
    "fairref.diffusion": (
        "fairref.fairness",
        "fairref.nets",
        "fairref.judges",
        "fairref.weights_io",
        "fairref.prompts",
    ),
    "fairref.fairness": ("fairref.diffusion", "fairref.nets", "fairref.judges", "fairref.prompts"),
}
CHECKERS = ("fairref.checks", "fairref.study")  # they look at the whole derivation
MACHINE_PATH = re.compile(r"(?<![\w.~*$}/-])/(?:home|root|work|tmp|Users|opt|mnt|srv)/\w")


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(p): p
    for p in [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "fairref").rglob("*.py"))]
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(name, everywhere=False):
    """Full names of what a file imports when it is imported, or also inside functions.

    `from a import b` is a.b where that is a file of ours, and else a.
    """
    found, stack = set(), list(TREES[name].body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{FILES[name]}:{node.lineno}: a relative import; write the full name"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner & set(FILES))
            if inner - set(FILES):
                found.add(node.module)
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def place(name):
    """The entry of ROWS that a file falls under: its own, or its room's."""
    room = name.rpartition(".")[0]
    return name if name in RANK else room if room != "fairref" and room in RANK else None


def test_every_file_has_its_row():
    homeless = [name for name in FILES if place(name) is None]
    assert not homeless, f"give each a row in ROWS: {homeless}"
    assert len(RANK) == sum(map(len, ROWS))


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    at_import, ours = imports(name), set(FILES)
    assert at_import <= imports(name, everywhere=True)
    upwards = {
        (name, other)
        for other in imports(name, everywhere=True) & ours
        if RANK[place(other)] < RANK[place(name)]
    }
    assert upwards <= set(UPWARD)
    assert not {other for _, other in upwards} & at_import, "an upward import stands inside a function"


def test_upward_imports_are_still_needed():
    for name, other in UPWARD:
        assert other in imports(name, everywhere=True)


def test_no_file_imports_itself_by_a_detour():
    list(TopologicalSorter({name: imports(name) & set(FILES) for name in FILES}).static_order())


@pytest.mark.parametrize("room", UNKNOWN)
def test_a_room_does_not_know(room):
    for name in FILES:
        if name == room or name.startswith(room + "."):
            for other in imports(name, everywhere=True):
                assert not any(other == u or other.startswith(u + ".") for u in UNKNOWN[room]), (name, other)


def test_only_finetuning_knows_both_sampling_and_fairness():
    for name in FILES:
        rooms = {".".join(other.split(".")[:2]) for other in imports(name, everywhere=True)}
        if {"fairref.diffusion", "fairref.fairness"} <= rooms:
            assert name.startswith("fairref.finetune.") or name.startswith(CHECKERS), name


@pytest.mark.parametrize("name", FILES)
def test_files_import_the_core_libraries_only(name):
    roots = {other.split(".")[0] for other in imports(name)}
    assert roots <= LIBRARIES | {"fairref"} | set(sys.stdlib_module_names)


def test_the_core_libraries_are_those_that_get_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {re.split(r"[^\w-]", line)[0] for line in setup["options"]["install_requires"].split()}
    assert required == {"pillow" if name == "PIL" else name for name in LIBRARIES}


def test_all_of_it_is_imported_without_the_extras():
    lines = [
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))",
        *(f"import {name}" for name in FILES),
    ]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_device_is_named_where_one_is_chosen_only():
    """All else goes where its input is: no file but those two knows of GPUs."""
    named = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "fairref").rglob("*.py")
        if re.search(r"""["']cuda|\.cuda\b""", file.read_text(encoding="utf-8"))
    }
    assert named == {"fairref/cli.py", "fairref/finetune/distributed.py"}


def test_import_fairref_does_not_import_torch():
    code = "import sys, fairref; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    functions = [n for n in ast.walk(TREES[name]) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f"line {f.lineno}: {f.name}" for f in functions if f.end_lineno - f.lineno >= LONGEST_FUNCTION]
    assert not long


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks and that are there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_no_path_of_one_machine(tracked):
    assert tracked
    for path in tracked:
        content = path.read_bytes()
        assert str(ROOT).encode() not in content, path
        if b"\0" not in content:
            for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
                assert not MACHINE_PATH.search(line), f"{path}:{number}: {line}"


@pytest.mark.parametrize(
    "text, found",
    [
        ('open("|home/someone/x")', True),
        ("see |tmp/a", True),
        ("'|work/main'", True),
        ("#!|usr/bin/env bash", False),
        ("runs|tmp/x", False),
        ("$HOME|work/x", False),
        ("https://example.org|home/x", False),
        ("~|work/x", False),
    ],
)
def test_what_a_machine_path_is(text, found):
    # written with | for /, or this file would hold such paths itself
    assert bool(MACHINE_PATH.search(text.replace("|", "/"))) == found


def test_no_file_is_large(tracked):
    assert [path for path in tracked if path.stat().st_size > 20 * MEGABYTE] == []
    weights = sum(path.stat().st_size for path in tracked if (ROOT / "weights") in path.parents)
    assert weights <= 48 * MEGABYTE


def test_ci_finds_the_readmes_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    commands = [line.strip() for line in lines if line.startswith("    pip install ")]
    assert [command.split(" && ")[-1] for command in commands] == [
        "python train.py --attr gender",
        "python -m pytest",
    ]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_the_readme_names_files_that_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`((?:fairref|tests|weights)/[\w/.]*|[\w]+\.py)`", text))
    assert len(names) > 20
    assert [name for name in names if not (ROOT / name).exists() and name != "weights/emoji"] == []
    for test in re.findall(r"`(test_\w+)`", text):
        assert any(
            f"def {test}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")
        ), test
