"""Draws pictures of a prompt:  python sample.py "a photo of the face of a pilot, a person" """

import sys

from fairref import cli
from fairref.generate import Settings, generate


def main(argv=None):
    parser = cli.Parser(prog="sample.py", description="Draw pictures of a prompt.")
    parser.add_argument("prompt", help="what to draw")
    parser.add_argument("--num-images", "-n", type=cli.whole(1), default=Settings.num_images, help="how many")
    parser.add_argument("--seed", type=cli.whole(0), default=Settings.seed, help="of the noise")
    parser.add_argument("--steps", type=cli.whole(1, 1000), help="sampling steps (None: the bundle's)")
    parser.add_argument("--guidance", type=float, help="guidance scale (None: the bundle's)")
    parser.add_argument("--negative-prompt", default="", help="what not to draw")
    cli.add_common(parser)
    parser.add_argument("--adapter", help="a run's folder, or an adapter file")
    parser.add_argument(
        "--out", help="folder for the pictures (None: samples/<prompt>, and the adapter's name)"
    )
    paths = generate(Settings(**vars(parser.parse_args(argv))))
    print(f"{len(paths) - 1} pictures in {paths[-1].parent}, all of them in {paths[-1]}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
