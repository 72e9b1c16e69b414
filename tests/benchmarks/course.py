"""Runs the notebooks of docs/course and writes their outputs into them.

    python tests/benchmarks/course.py [CHAPTER ...] [--check]

A chapter is a number, as 2, or a notebook's path; none means all. Each runs in a kernel of its own, in an empty
temporary folder, with this checkout's fairref. With --check nothing is written: the command fails where a cell raises,
or where what a cell prints is not what the notebook has. Images are not compared. Needs the extra "course"; about a
minute for all.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[2]
COURSE = ROOT / "docs" / "course"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
LONGEST = 300  # seconds of one cell


def notebook_paths(chapters: list[str]) -> list[Path]:
    """Return the notebooks of the chapters, numbers or paths, or all. Raises SystemExit where there is none."""
    paths = []
    for chapter in chapters or ["[0-9]"]:
        named = [Path(chapter)] if chapter.endswith(".ipynb") else sorted(COURSE.glob(f"{chapter}_*.ipynb"))
        if not named or not all(path.is_file() for path in named):
            raise SystemExit(f"There is no chapter '{chapter}'; expected a number or path of {COURSE}.")
        paths += named
    return paths


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return a copy that was run, without what differs from run to run: times, versions, stderr."""
    notebook = nbformat.from_dict(notebook)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": path,
        "OMP_WAIT_POLICY": "PASSIVE",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            timeout=LONGEST,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return notebook


def printed(cell: nbformat.NotebookNode) -> str:
    """Return what a cell wrote to stdout."""
    return "".join(output.text for output in cell.get("outputs", []) if output.get("name") == "stdout")


def differing(committed: nbformat.NotebookNode, run: nbformat.NotebookNode) -> list[str]:
    """Return a message for each cell that printed something else than the committed notebook has."""
    return [
        f"cell {old.id} printed\n{printed(new)}but the notebook has\n{printed(old)}"
        for old, new in zip(committed.cells, run.cells, strict=True)
        if printed(old) != printed(new)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the chapters; return 1 where a cell raised or, with --check, printed something else."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="numbers or paths; default: all")
    parser.add_argument("--check", action="store_true", help="write nothing; compare what cells print")
    options = parser.parse_args(arguments)
    failed = False
    for path in notebook_paths(options.chapters):
        began = time.perf_counter()
        committed = nbformat.read(path, as_version=4)
        try:
            run = execute(committed)
        except CellExecutionError as error:
            faults = [re.sub(r"\x1b\[[\d;]*m", "", str(error))]  # without colours
        else:
            faults = differing(committed, run) if options.check else []
            if not options.check:
                nbformat.write(run, path)
        print(f"{path.name}: {time.perf_counter() - began:.1f} s", *faults, sep="\n  ")
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
