"""fairref bundle check: what a folder of weights has and lacks."""

from collections.abc import Sequence

from fairref.bundle import inspection
from fairref.bundle.loading import DEFAULT, bundle_path, load_bundle
from fairref.bundle.recipe import resolve
from fairref.commands import cli
from fairref.errors import UserError
from fairref.prompts import read_own


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where the bundle is not good for drawing, finetuning and evaluating."""
    parser = cli.Parser(
        prog="fairref bundle",
        description="List the parts of a bundle, load each, and say where to get what is missing.",
        example="fairref bundle check weights/sd15",
    )
    parser.add_argument("command", choices=("check",), help="check: list the parts and load each")
    parser.add_argument("weights", nargs="?", default=DEFAULT, help="bundle, diffusers-layout folder or file")
    options = parser.parse_args(argv)
    path = bundle_path(options.weights)
    statuses = inspection.inspect_bundle(path)
    print("\n".join(inspection.lines(options.weights, statuses)))
    prompts_right = _prompts_are_right(path)
    good = inspection.uses(statuses)
    try:
        if good:
            bundle = load_bundle(path)  # parts that load may yet not fit together
            resolve((), bundle.recipe, {}, path, bundle.attributes)
        print(f"good to {'; '.join(good)}" if good else "not good for anything yet")
    except UserError as error:
        print(f"not good for anything until this is mended: {error}")
        return 1
    broken = any(status.state not in inspection.STATES for status in statuses)
    return 0 if {"draw", "finetune", "evaluate"} <= set(good) and prompts_right and not broken else 1


def _prompts_are_right(path):
    """Whether prompts.json, which may be absent, can be read; says what is wrong with it."""
    try:
        if read_own(path) is None:
            print("  prompts.json is not there: fairref's own prompts take its place")
    except UserError as error:
        print(f"  {'broken':10}{'prompts.json':22}\n      {error}")
        return False
    return True
