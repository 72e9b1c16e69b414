"""fairref evaluate: how fair, and how faithful, a model's images are."""

import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path

from fairref import settings
from fairref.bundle.loading import load_bundle
from fairref.bundle.own_judges import parse_judges
from fairref.commands import cli
from fairref.errors import UserError
from fairref.evaluation.evaluation import EvaluationOptions, prepare, report_of, run, usual_attribute
from fairref.evaluation.folders import folder_report
from fairref.evaluation.judging import SEED
from fairref.evaluation.parts import EXPLICIT_IMAGES
from fairref.evaluation.sentences import lines
from fairref.evaluation.sweeps import Sweep, run_sweep, sweep_file
from fairref.files.paths import check_writable, write_json
from fairref.generation.padding import PADDING_HELP, PADDINGS
from fairref.processes import DTYPES, choose_device, start
from fairref.prompts import PARTS
from fairref.prompts.sets import OCCUPATIONS
from fairref.training.checkpoints import held
from fairref.training.signals import interrupting

BASELINES = "baselines.json"  # in a run's folder


def parser() -> cli.Parser:
    """The command line."""
    parser = cli.Parser(
        prog="fairref evaluate",
        description="Measure the bias of a model's images.",
        example="fairref evaluate --adapter runs/gender",
    )
    cli.add_common(parser)
    cli.add_adapters(parser)
    parser.add_argument(
        "--attr",
        help="attributes, as in train.py (None: --target's, else those of the one --adapter, else gender, or what the"
        " judges know)",
    )
    parser.add_argument(
        "--target", action="append", help="the shares that were aimed at, as in train.py (None: equal shares)"
    )
    parser.add_argument(
        "--prompts",
        default=OCCUPATIONS,
        help="concepts, as sports,descriptors, each measured alone; or a text file (all of it is its part train)",
    )
    parser.add_argument("--part", default="test", choices=PARTS, help="which of a concept's parts")
    parser.add_argument(
        "--num-images",
        "-n",
        type=cli.whole(1, settings.MAX_COUNT),
        help="images of each prompt (None: the bundle's, else 60, for race or skin_tone 80, for several attributes"
        " 160)",
    )
    parser.add_argument(
        "--explicit-images",
        type=cli.whole(0, settings.MAX_COUNT),
        help=f"images of each occupation and class that a prompt names (None: {EXPLICIT_IMAGES}, or where that would be"
        " more than all others as many as those)",
    )
    of_run = "(None: as the run evaluates that made the one --adapter, else the bundle's)"
    parser.add_argument("--steps", type=cli.whole(1), help=f"sampling steps {of_run}")
    parser.add_argument(
        "--guidance", type=cli.number(0, settings.MAX_NUMBER), help=f"guidance scale {of_run}"
    )
    parser.add_argument("--end", choices=("zero", "sigma_min"), help=f"end of the solver {of_run}")
    parser.add_argument("--padding", default="full", choices=PADDINGS, help=PADDING_HELP)
    parser.add_argument("--seed", type=cli.whole(0), default=SEED, help="seed of the noise")
    settings.add_run_options(parser, ("judge",))
    _add_ways(parser)
    parser.add_argument("--out", type=cli.path, help="JSON file (None: the JSON goes to stdout)")
    return parser


def _add_ways(parser):
    """What else may be evaluated, or measured with it, and where it is kept."""
    parser.add_argument(
        "--cache",
        type=cli.path,
        metavar="FOLDER",
        help="folder in which judgements are kept, so that nothing is drawn twice, and for judged.csv, judged.json and"
        " what --sweep and --baseline leave (None: the run's, where --adapter is one run's folder; else none is kept)",
    )
    parser.add_argument(
        "--sweep",
        help="evaluate at several values, as guidance=1,3,5,7.5,12 or strength=0,0.5,1; written as sweep-guidance.json"
        " or sweep-strength.json into the run's folder, or that of --cache",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        help="measure another way to a fairer model, too: coin, projection, uce or fair_pca, each also with its number,"
        " as projection:2000; or path/to/file.py:name of your own (docs/baselines.md). May be given several times."
        " Written as baselines.json into the run's folder, or that of --cache",
    )
    _add_folders(parser)


def _add_folders(parser):
    """Options of images and labels that are there already."""
    parser.add_argument(
        "--images",
        type=cli.path,
        metavar="FOLDER",
        help="judge these images, whatever made them, and draw none: a subfolder a prompt, named after it or in"
        " FOLDER/prompts.json",
    )
    parser.add_argument(
        "--images-before",
        type=cli.path,
        metavar="FOLDER",
        help="the originals of --images, with the same prompts and names, for the likeness",
    )
    parser.add_argument(
        "--labelled",
        type=cli.path,
        metavar="FOLDER",
        help="pictures of known classes, on which the judges' errors are counted: CelebA, FairFace, or labels.csv with"
        " the columns file and the attributes",
    )
    parser.add_argument(
        "--labels",
        type=cli.path,
        metavar="FILE",
        help="labels of some of the judged images, by hand or by another judge: a CSV table with the columns prompt,"
        " image (its number, or its file's name) and the attributes, and model, where they are not all the last one's",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line, in each of torchrun's processes. Exit code 1 where nobody takes the result."""
    options = (known := parser()).parse_args(argv)
    _refuse_beside_images(options, known)
    sweep, baselines = _sweep(options), _baselines(options)
    judges = parse_judges(options.judge or [])
    processes, device = start(choose_device(options.device))
    try:
        processes.first_does(lambda: _check_output(options))
        bundle = load_bundle(options.weights, device, DTYPES[options.dtype or "float32"], judges)
        if options.images is not None:
            report = _of_folder(options, bundle, processes)
            return _give(options, bundle, report) if processes.first else 0
        evaluation = prepare(bundle, _asked(options), processes)
        with _alone_in(evaluation.home, processes), _resumable(evaluation):
            if sweep is not None:
                path = sweep_file(evaluation, sweep)
                run_sweep(evaluation, sweep, path)
                return _say_written(path) if processes.first else 0
            evaluation = _with_baselines(evaluation, baselines)
            results = run(evaluation)
        if processes.first and baselines:
            _write_baselines(evaluation, results)
        return _give(options, bundle, report_of(evaluation, results)) if processes.first else 0
    finally:
        processes.stop()


def _refuse_beside_images(options, known):
    """Refuses what only drawing has a use for beside --images, and --images-before without it."""
    if options.images is None and options.images_before is not None:
        raise UserError("--images-before has no effect without --images; leave it out.")
    drawing = ("adapter", "strength", "any_base", "prompts", "part", "num_images", "explicit_images", "steps")
    for name in (
        (*drawing, "guidance", "end", "padding", "seed", "cache", "sweep", "baseline")
        if options.images
        else ()
    ):
        if getattr(options, name) != known.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} has no effect with --images; leave it out.")


def _of_folder(options, bundle, processes):
    """The report on --images."""
    return folder_report(
        bundle,
        options.images,
        options.attr or (None if options.target else usual_attribute(bundle)),
        target=options.target,
        before=options.images_before,
        labelled=options.labelled,
        labels=options.labels,
        processes=processes,
    )


def _sweep(options):
    """--sweep, or None. Raises UserError beside what it changes or has no use for."""
    if options.sweep is None:
        return None
    sweep = Sweep.parse(options.sweep)
    for name in (sweep.name, "out", "labels"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} has no effect with --sweep {sweep.name}; leave it out.")
    return sweep


def _baselines(options):
    """What --baseline names. Raises UserError beside --sweep."""
    if not options.baseline:
        return []
    from fairref.baselines.registry import parse_baselines

    if options.sweep is not None:
        raise UserError("--baseline is fitted to one guidance and has no effect with --sweep; leave one out.")
    return parse_baselines(options.baseline)


def _with_baselines(evaluation, baselines):
    """The evaluation with its baselines, fitted; their fits are kept beside what is judged. Raises UserError."""
    if not baselines:
        return evaluation
    from fairref.baselines.fitting import fit_baselines

    if evaluation.home is None:
        raise UserError(
            "--baseline is written into a run's folder; give one as --adapter, or a folder as --cache."
        )
    path = evaluation.home / BASELINES
    evaluation.settings.processes.first_does(lambda: check_writable(path))
    fits = evaluation.home / "baselines"
    prompts = [prompt for part in evaluation.parts for prompt in part.prompts]
    return replace(evaluation, others=fit_baselines(baselines, evaluation.settings, prompts, fits))


def _write_baselines(evaluation, results):
    """baselines.json: name -> part -> report, as in evaluation.json; and each report in a few lines."""
    found = {source.label.removeprefix("baseline "): results[source.label] for source in evaluation.others}
    for name, reports in found.items():
        for report in reports.values():
            print("\n  ".join([f"baseline {name}:", *lines(report)]), file=sys.stderr)
    write_json(evaluation.home / BASELINES, found)
    print(f"written: {evaluation.home / BASELINES}", file=sys.stderr)


def _check_output(options):
    """Refuses an output that can't be had, before the work."""
    if options.out:
        check_writable(options.out)
    elif options.sweep is None and cli.lost_stdout():
        raise UserError("stdout is closed, so the result would be lost; give a file as --out.")


def _asked(options):
    """The options of the evaluation itself."""
    names = {field.name for field in fields(EvaluationOptions)}
    given = {name: value for name, value in vars(options).items() if name in names}
    return EvaluationOptions(**{**given, "images": options.num_images})


@contextmanager
def _alone_in(home, processes):
    """Keeps other evaluations out of the folder of results, and this one out of a run's at work."""
    with ExitStack() as stack:
        if home is not None:
            processes.first_does(lambda: stack.enter_context(held(home)))
        yield


@contextmanager
def _resumable(evaluation):
    """Says how an evaluation goes on that a signal ended."""
    try:
        with interrupting():
            yield
    except KeyboardInterrupt:
        kept = evaluation.settings.kept
        raise KeyboardInterrupt(
            f"\nstopped; what was judged is kept in {kept}, the same command goes on with it" if kept else ""
        ) from None


def _say_written(path):
    print(f"written: {path}")
    return 0


def _give(options, bundle, report):
    """Writes the report, or prints it -> exit code."""
    reports = [report] if "judges" in report else list(report.values())
    text = "\n".join(line for one in reports for line in lines(one))
    own = [
        {
            "role": role,
            **{key: Path(said).name if key == "path" else said for key, said in source.to_dict().items()},
        }
        for role, sources in bundle.own_judges.items()
        for source in sources
    ]
    made_by = {"weights": bundle.path.name}
    report = {**made_by, **({"judge": own} if own else {}), **report}
    if options.out:
        write_json(options.out, report)
        print(text)
        return _say_written(options.out)
    print(text, file=sys.stderr)
    print(json.dumps(report, indent=2))
    return 1 if cli.lost_stdout() else 0
