"""The house of docs and README: arrows run one way, leaf rooms can go, the core stays small, and public
functions are typed."""

import ast
import configparser
import inspect
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from documents import MACHINE_PATH
from waiting import done

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"torch", "numpy", "scipy", "PIL", "safetensors", "tokenizers"}
EXTRAS = (
    "pytest",
    "diffusers",
    "peft",
    "jinja2",
    "transformers",
    "open_clip",
    "torchvision",
    "skimage",
    "ot",
    "matplotlib",
    "resvg_py",
    "statsmodels",
    "tensorboard",
    "ruff",
    "gradio",
    "fastapi",
    "uvicorn",
)
MEGABYTE = 2**20
LONGEST_FUNCTION = 60  # lines
LOOSE_FILES = 6  # at most, in fairref/
MOST_PARAMETERS = 6  # of a function of the core

# From the roof down: a file imports from its own room or from rooms below it.
LEAVES = (
    "emoji",
    "verification",
    "exchange",
    "baselines",
    "reporting",
    "tools",
    "web",
)  # commands alone know them
ROOMS = (
    ("train", "sample"),
    ("__init__", "__main__"),
    ("commands",),
    LEAVES,
    ("training",),
    ("evaluation",),
    ("generation",),
    ("bundle",),
    ("fairness",),
    ("diffusion",),
    ("prompts",),
    ("judges",),
    ("nets",),
    ("files",),
    ("processes",),
    ("settings",),
    ("errors", "progress"),
)
RANK = {room: rank for rank, row in enumerate(ROOMS) for room in row}
# What a room must not know, anywhere.
UNKNOWN = {
    "nets": ("fairref.files", "fairref.prompts", "fairref.fairness", "pathlib"),
    "judges": ("fairref.files", "fairref.prompts", "fairref.fairness", "fairref.diffusion", "pathlib"),
    "diffusion": ("fairref.fairness", "fairref.nets", "fairref.judges", "fairref.files", "fairref.prompts"),
    "fairness": ("fairref.diffusion", "fairref.nets", "fairref.judges", "fairref.prompts"),
}
CORE = (
    *("nets/__init__", "nets/clip", "nets/unet", "nets/vae"),
    *("diffusion/__init__", "diffusion/schedule", "diffusion/solver", "diffusion/model", "diffusion/sampler"),
    *("diffusion/gradient", "fairness/transport", "fairness/losses", "training/step", "training/terms"),
    "generation/rollout",
)
CORE_LINES = 2400


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


def room(name):
    """The room of a file of ours: its folder in fairref/, or its own name."""
    parts = name.split(".")
    return "__init__" if name == "fairref" else parts[1] if parts[0] == "fairref" else parts[0]


def is_init(name, other):
    """Whether `other` is the package itself, asked for its version: it imports nothing of ours when it is imported."""
    return other == "fairref" and not imports("fairref") & (set(FILES) - {"fairref"})


def test_every_file_has_its_room():
    assert [name for name in FILES if room(name) not in RANK] == []
    loose = [path for path in (ROOT / "fairref").glob("*.py")]
    assert len(loose) <= LOOSE_FILES


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downwards(name):
    for other in imports(name, everywhere=True) & set(FILES):
        assert room(other) == room(name) or is_init(name, other) or RANK[room(other)] > RANK[room(name)], (
            other
        )


@pytest.mark.parametrize("leaf", LEAVES)
def test_commands_alone_know_a_leaf_room(leaf):
    knowing = {
        room(name)
        for name in FILES
        if any(other.startswith(f"fairref.{leaf}") for other in imports(name, everywhere=True))
    }
    assert "commands" in knowing and knowing <= {leaf, "commands"}


def test_no_file_imports_itself_by_a_detour():
    ours = set(FILES) - {"fairref"}
    list(TopologicalSorter({name: imports(name) & ours for name in ours}).static_order())


@pytest.mark.parametrize("of", UNKNOWN)
def test_a_room_does_not_know(of):
    for name in FILES:
        if room(name) == of:
            for other in imports(name, everywhere=True):
                assert not any(other == u or other.startswith(u + ".") for u in UNKNOWN[of]), (name, other)


@pytest.mark.parametrize("name", FILES)
def test_files_import_the_core_libraries_only(name):
    roots = {other.split(".")[0] for other in imports(name)}
    assert roots <= LIBRARIES | {"fairref"} | set(sys.stdlib_module_names)


def test_the_core_libraries_are_those_that_get_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {re.split(r"[^\w-]", line)[0] for line in setup["options"]["install_requires"].split()}
    assert required == {"pillow" if name == "PIL" else name for name in LIBRARIES}
    packages = {name for name in setup["options"]["packages"].split() if name != "fairref.weights"}
    assert packages == {module_name(path) for path in (ROOT / "fairref").rglob("__init__.py")}


def test_all_of_it_is_imported_without_the_extras():
    lines = [
        f"import sys; sys.modules.update(dict.fromkeys({EXTRAS!r}))",
        *(f"import {name}" for name in FILES if name != "fairref.__main__"),
    ]
    found = done([sys.executable, "-c", "\n".join(lines)], cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_a_device_is_named_where_one_is_chosen_only():
    """All else goes where its input is: no file but one knows of GPUs; help texts may name them."""
    named = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "fairref").rglob("*.py")
        if re.search(r"""["']cuda["':]|\.cuda\b""", file.read_text(encoding="utf-8"))
    }
    assert named == {"fairref/processes.py"}


def test_import_fairref_does_not_import_torch():
    code = "import sys, fairref; assert 'torch' not in sys.modules"
    found = done([sys.executable, "-c", code], cwd=ROOT)
    assert found.returncode == 0, found.stderr


def test_what_fairref_offers_is_there_and_eq_9_is_two_files_away():
    import fairref

    for name in fairref.OFFERED:
        assert getattr(fairref, name) is not None
    offered = Path(inspect.getsourcefile(fairref.adjusted_gradient))
    assert offered == ROOT / "fairref" / "diffusion" / "gradient.py"
    assert "eq 9 in full" in offered.read_text(encoding="utf-8")


def test_the_core_is_read_in_an_afternoon():
    """What finetuning iterates stays within the lines that it had before rooms and seams."""
    found = {
        module_name(path)
        for folder in ("nets", "diffusion")
        for path in (ROOT / "fairref" / folder).rglob("*.py")
    }
    files = [ROOT / "fairref" / f"{name}.py" for name in CORE]
    assert found <= {module_name(path) for path in files}
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files) <= CORE_LINES


def functions(name):
    """All functions of a file, with the class they stand in, if in one."""
    for node in TREES[name].body:
        if isinstance(node, ast.ClassDef):
            yield from ((node, f) for f in node.body if isinstance(f, ast.FunctionDef))
        elif isinstance(node, ast.FunctionDef):
            yield None, node


def parameters(cls, function):
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    return named[1:] if cls is not None and not is_static else named


@pytest.mark.parametrize("name", [module_name(ROOT / "fairref" / f"{name}.py") for name in CORE])
def test_functions_of_the_core_take_few_parameters(name):
    many = [f.name for cls, f in functions(name) if len(parameters(cls, f)) > MOST_PARAMETERS]
    assert not many


def is_typed(annotation):
    """Whether an annotation says something: Any and a bare container do not."""
    if annotation is None:
        return False
    bare = {"Any", "dict", "list", "tuple", "set", "Callable"}
    inside = {id(node.value) for node in ast.walk(annotation) if isinstance(node, ast.Subscript)}
    names = [node for node in ast.walk(annotation) if isinstance(node, ast.Name)]
    return not any(node.id in bare and id(node) not in inside for node in names)


@pytest.mark.parametrize("name", FILES)
def test_public_functions_are_typed(name):
    untyped = []
    for cls, function in functions(name):
        hidden = function.name.startswith("_") and function.name != "__init__"
        if hidden or (cls is not None and cls.name.startswith("_")):
            continue
        untyped += [
            f"{function.name}({a.arg})" for a in parameters(cls, function) if not is_typed(a.annotation)
        ]
        if function.name != "__init__" and not is_typed(function.returns):
            untyped.append(f"{function.name} ->")
    assert not untyped


@pytest.mark.parametrize("name", FILES)
def test_functions_fit_a_screen(name):
    every = [n for n in ast.walk(TREES[name]) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    long = [f"line {f.lineno}: {f.name}" for f in every if f.end_lineno - f.lineno >= LONGEST_FUNCTION]
    assert not long


def test_no_test_file_imports_another():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert module not in tests, f"{path}:{node.lineno}"


@pytest.fixture(scope="module")
def tracked():
    """The files that git tracks and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
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


WITHOUT_THE_OTHER = """
import importlib, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__ + repr(finder)]
sys.path[:0] = [{copy!r}, {tests!r}]
from fairref import __main__
sys.exit(__main__.main({argv!r}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("leaf", LEAVES)
def test_without_a_leaf_room_everything_else_runs(leaf, tmp_path):
    """In a copy that lacks the room's folder: train, sample, evaluate, verify and check, on a bundle made before."""
    from tiny_bundle import write_tiny_bundle

    weights = str(write_tiny_bundle(tmp_path / "tiny"))
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "fairref", copy / "fairref", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / "fairref" / leaf)

    def run(*argv):
        code = WITHOUT_THE_OTHER.format(copy=str(copy), tests=str(ROOT / "tests"), argv=list(argv))
        return subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    commands = {
        "emoji": ("emoji", "sheet", "--font", "none.ttf"),
        "verification": ("verify",),
        "exchange": ("import", "x.safetensors", "--out", "y"),
        "baselines": ("evaluate", "--weights", weights, "--baseline", "coin", "--cache", "cache"),
        "reporting": ("figures", "7"),
        "tools": ("faces", "--images", "x", "--out", "y.safetensors"),
        "web": ("serve",),
    }
    done = run(*commands[leaf])
    assert done.returncode == 2 and f"fairref/{leaf}" in done.stderr and done.stderr.count("\n") == 1, (
        done.stderr
    )
    for argv in (
        ("train", "--attr", "gender", "--weights", weights, "--out", "run"),
        ("sample", "a photo", "--weights", weights, "--adapter", "run", "-n", "1"),
        ("evaluate", "--weights", weights, "--adapter", "run", "-n", "1", "--out", "report.json"),
        ("bundle", "check", weights),
        *([("verify",)] if leaf != "verification" else []),
    ):
        done = run(*argv)
        assert done.returncode == 0, (argv, done.stderr)


@pytest.mark.slow
def test_without_the_emoji_room_the_default_bundle_has_both_judges(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "fairref", copy / "fairref", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(copy / "fairref" / "emoji")
    (copy / "weights").symlink_to(ROOT / "weights")
    (tmp_path / "prompts.txt").write_text("a photo of the face of a pilot, a person\na photo of a nurse\n")
    argv = ["evaluate", "--prompts", "./prompts.txt", "--part", "train", "-n", "2", "--steps", "4"]
    code = WITHOUT_THE_OTHER.format(
        copy=str(copy), tests=str(ROOT / "tests"), argv=[*argv, "--out", "report.json"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "(classifier)" in done.stdout and "(templates)" in done.stdout


@pytest.mark.slow
def test_a_wheel_runs_both_front_doors_from_an_empty_folder(tmp_path):
    """Built from the repository and put into a folder of its own, with the default bundle inside."""
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "."]
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "runs", "build", "*.egg-info"))
    subprocess.run([*wheel, str(source)], cwd=tmp_path, check=True)
    shutil.rmtree(source)
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    empty.mkdir()
    (built,) = tmp_path.glob("*.whl")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(installed),
        str(built),
    ]
    subprocess.run(install, check=True)
    short = (
        "--iterations=1",
        "--batch=3",
        "--steps=2",
        "--validate-every=0",
        "--grid-every=0",
        "--evaluate=none",
    )
    draw = ("-n1", "--steps=2", "--adapter=runs/gender")
    for argv in (
        ["train", "--attr", "gender", *short],
        ["sample", "a photo of the face of a pilot, a person", *draw],
    ):
        code = WITHOUT_THE_OTHER.format(copy=str(installed), tests=str(installed), argv=argv)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=empty, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert list(empty.glob("samples/*/seed0-000.png"))
