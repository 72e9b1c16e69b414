"""fairref balance: which terms of the loss hold a run where it has ended."""

from collections.abc import Sequence

from fairref import settings
from fairref.commands import cli
from fairref.files.paths import check_writable, write_file, write_json
from fairref.reporting import charts
from fairref.tools.balance import CLIPS, balance, point_of
from fairref.training.loop import RAW_FILE
from fairref.training.run import setup_of_run

LEAST, BATCHES = 20, 24
MEANING = "below 0 it makes the lean smaller, above 0 it holds it"
Report = dict[str, object]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref balance",
        description="Say how each term of the loss pulls on the lean that is left where a run has ended: what makes it"
        " smaller, and what holds it there. Writes balance.json and balance.svg into the run's folder.",
        example="fairref balance runs/gender",
    )
    parser.add_argument("run", type=cli.path, help="folder of a run")
    parser.add_argument(
        "--adapter", type=cli.path, help=f"another file of the run's adapter (None: {RAW_FILE} in its folder)"
    )
    parser.add_argument(
        "--batches",
        type=cli.whole(LEAST, settings.MAX_COUNT),
        default=BATCHES,
        help="batches, each as long as a few iterations of training; more make the standard errors smaller",
    )
    settings.add_run_options(parser, ("weights", "device"))
    options = parser.parse_args(argv)
    setup = setup_of_run(options.run, options.weights, options.device)
    point = point_of(setup, options.adapter or options.run / RAW_FILE)
    files = [options.run / f"balance.{ending}" for ending in ("json", "svg")]
    for file in files:
        check_writable(file)
    report = balance(point, options.batches)
    write_json(files[0], report)
    write_file(files[1], figure(report).encode())
    print(*lines(report), *files, sep="\n")


def lines(report: Report) -> list[str]:
    """The report as text: a table for each attribute, and the norms."""
    said = []
    for name, of in report["attributes"].items():
        said.append(
            f"{name}: of {report['neutral']} neutral batches {_counted(of['leaned'])} leaned before,"
            f" {_counted(of['still_lean'])} still do."
        )
        said.append(f"A term's pull on the lean ({MEANING}), mean ± standard error over batches:")
        said.append(f"  {'term':12}" + "".join(f"{clip:>24}" for clip in CLIPS))
        for term in of["pull"][CLIPS[0]]:
            cells = (_shown(of["pull"][clip][term]) for clip in CLIPS)
            said.append(f"  {term:12}" + "".join(f"{cell:>24}" for cell in cells))
    norms = report["norm"]
    return [
        *said,
        f"norm of a batch's gradient where images are asked to change: {_shown(norms['asked'])}"
        f" ({norms['asked']['batches']} of {report['batches']} batches); where none is: {_shown(norms['not_asked'])}",
        f"clipped to {report['clip']:g}: {report['clipped']:.0%} of the batches"
        if report["clip"]
        else "clip is 0: nothing is clipped",
    ]


def _counted(classes):
    """So many batches, and of which class."""
    return f"{sum(classes.values())} ({', '.join(f'{n} {name}' for name, n in classes.items() if n)})"


def _shown(value):
    """Mean ± standard error over batches."""
    if value["mean"] is None:
        return "none"
    return f"{value['mean']:.3g}" + ("" if value["error"] is None else f" ± {value['error']:.2g}")


def figure(report: Report) -> str:
    """Both pulls of each term as bars, each as a share of the mean length of the gradients that it is of."""
    groups = {}
    for name, of in report["attributes"].items():
        for clip in CLIPS:
            length = report["length"][clip] or 1.0
            limit = f" to {report['clip']:g}" if clip == CLIPS[1] and report["clip"] else ""
            groups[f"{name}, {clip}{limit} (mean length {length:.2g})"] = {
                term: tuple((v["mean"] + z * v["error"]) / length for z in (0, -1.96, 1.96))
                for term, v in of["pull"][clip].items()
            }
    about = "pull, as a share of the gradients' mean length; mean and 95% interval"
    return charts.bars(groups, about, f"Pull of the loss's terms on the lean that is left: {MEANING}")
