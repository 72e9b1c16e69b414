"""fairref plan: how many images an evaluation needs, and what it can see."""

from collections.abc import Sequence

import numpy as np

from fairref.commands import cli
from fairref.evaluation import fair
from fairref.evaluation.gaps import LEVEL
from fairref.fairness.metrics import noise_floor

MAX_CLASSES = 16  # gender x race x age
MAX_PROMPTS, MAX_IMAGES = 100_000, 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref plan",
        description="Say how many images an evaluation needs, and what a given one can see.",
        example="fairref plan --classes 8 --prompts 50 --half-width .03",
    )
    parser.add_argument(
        "--classes",
        type=cli.whole(2, MAX_CLASSES),
        default=2,
        help="classes; of several attributes their combinations",
    )
    parser.add_argument("--prompts", type=cli.whole(1, MAX_PROMPTS), default=50, help="prompts")
    parser.add_argument(
        "--images",
        type=cli.whole(1, MAX_IMAGES),
        help="images of each prompt (None: 60 for 2 classes, 80 for up to 4, 160 for more)",
    )
    parser.add_argument(
        "--half-width",
        type=cli.number(0.0001, 0.5),
        default=0.03,
        help="half of the interval that a share may have, from 0.0001 to 0.5",
    )
    options = parser.parse_args(argv)
    images = options.images or (60 if options.classes == 2 else 80 if options.classes <= 4 else 160)
    print("\n".join(lines(options.classes, options.prompts, images, options.half_width)))


def lines(K: int, P: int, n: int, half_width: float) -> list[str]:
    """What to know before an evaluation with K classes, P prompts and n images of each."""
    alone = fair.images_for(half_width)
    each = -(-alone // P)
    seen, said = fair.smallest_gap(P, n, np.full(K, 1 / K)), fair.normal_gap(P, n, K)
    mean, std = noise_floor(K, n)
    sees = ["  no rms gap for sure: these are too few images"]
    if seen is not None:
        sees = [
            f'  an rms gap of {seen:.3f}, which the test of "fair" rejects with {fair.POWER:.0%} power',
            f"    (a normal approximation says {said:.3f}, which it rejects with {fair.power(said, P, n, K):.0%})",
        ]
    return [
        f"To know a share to ± {half_width:g} ({LEVEL:.0%}), whatever it is, takes",
        f"  of one prompt: {alone:,} images a prompt, {alone * P:,} in all",
        f"  over all prompts: {each:,} a prompt, {each * P:,} in all",
        f"{K} classes, {P:,} prompts x {n:,} images, {P * n:,} in all, show",
        f"  a share of one prompt to ± {fair.half_width_of(n):.3f}, over all to ± {fair.half_width_of(n * P):.3f}",
        *sees,
        f"  of a fair model a bias of {mean:.3f} ± {std:.3f} (the floor), over all {mean:.3f} ± {std / P**0.5:.3f}",
    ]
