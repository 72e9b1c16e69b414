"""Finetunes a bundle for fairness:  python train.py --attr gender  (or torchrun train.py --attr gender)"""

import sys

from fairref import cli
from fairref.finetune import recipes
from fairref.run import Options, run


def main(argv=None):
    parser = cli.Parser(
        prog="train.py", description="Finetune an adapter for fairness with the adjusted gradient."
    )
    parser.add_argument(
        "--attr",
        help="what to make fair: attributes of the bundle, as in gender,race, or one with its shares if not equal "
        "ones, as in gender=0.3,0.7",
    )
    parser.add_argument(
        "--target",
        action="append",
        help="the shares of an attribute in every group of the others, as in age=0.75,0.25; may be given several "
        "times; or a joint table in a .json file (None: equal shares)",
    )
    parser.add_argument(
        "--prompts",
        help="concepts that take turns, as in occupations,sports, of the bundle or of fairref/prompts; or a text file, "
        "one prompt a line (None: occupations)",
    )
    parser.add_argument(
        "--prompt-template",
        metavar="TEXT",
        help='the prompt of an occupation, as in "a photo of a {occupation}" (None: that of the method)',
    )
    parser.add_argument(
        "--out", help="folder of the run (None: the first free of runs/<attr>, runs/<attr>-2, ...)"
    )
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with a run; its settings are those of its folder"
    )
    cli.add_common(parser, ask=True)
    recipes.add_options(
        parser.add_argument_group("recipe", "what is not given is the bundle's, or else SD-1.5's")
    )
    options = vars(parser.parse_args(argv))
    names = ("attr", "target", "prompts", "prompt_template", "out", "resume", "weights", "device", "dtype")
    common = {key: options.pop(key) for key in names}
    run(Options(**common, recipe=options))


if __name__ == "__main__":
    sys.exit(cli.run(main))
