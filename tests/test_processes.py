"""Any number of processes and any micro-batch make the same run; one that ends, ends all, with a message."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bundle import write_tiny_bundle
from tiny_run import make_setup, moved
from waiting import ends, outputs, wait_for

from fairref import processes as distributed
from fairref.bundle.loading import load_bundle
from fairref.errors import UserError
from fairref.evaluation import judging
from fairref.evaluation.judging import EvaluationSettings, drawn_by, judge_prompts
from fairref.fairness.faces import TEMPLATE, DetectedFaces
from fairref.files.scores import read_scores
from fairref.generation.drawing import Drawing
from fairref.training import step as iteration
from fairref.training.checkpoints import held
from fairref.training.loop import iterate, new_state, update
from fairref.training.step import iteration_gradient
from fairref.training.validation import start_validation

ROOT = Path(__file__).parents[1]
DARK = 138  # mean of a picture's values
N, ITERATIONS = 5, 3  # of two and four processes, none have the same number of images


def environments(count):
    """What torchrun tells each of its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    base = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(common if count > 1 else {})}
    return [{**base, **({"RANK": str(r), "LOCAL_RANK": str(r)} if count > 1 else {})} for r in range(count)]


def start(count, *command, **options):
    return [
        subprocess.Popen([sys.executable, *map(str, command)], env=env, text=True, **options)
        for env in environments(count)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


def detector(x, dark=DARK):
    """Finds a face in pictures that are not dark, at a place and of a size that follow from how bright they are."""
    found = []
    for light in x.float().mean((1, 2, 3)).tolist():
        side, some = int(light) - 124, slice(None if light > dark else 0)
        box, landmarks = torch.tensor([[2, 3, 2 + side, 3 + side]]), torch.tensor(TEMPLATE) / 112 * side + 2
        found.append(DetectedFaces(box[some], landmarks[None][some]))
    return found


def gradients(folder, out):
    """What one process does: pictures, their targets and gradients of some iterations, an update after each."""
    processes, device = distributed.start(torch.device("cpu"))
    torch.set_num_threads(1)
    found, counts, pairs = {}, [], []
    real, real_pair = iteration.joint_ot, iteration.draw_pair
    iteration.joint_ot = lambda *args, **options: counts.append(real(*args, **options)) or counts[-1]
    iteration.draw_pair = lambda *args: pairs.append(real_pair(*args)) or pairs[-1]
    for dtype in (torch.float32, torch.float64):
        bundle = replace(load_bundle(folder, device, dtype), detector=detector)
        for micro_batch in (0, 3):
            setup = make_setup(
                bundle, "gender,skin_tone", batch=N, C=0.5, component="both", micro_batch=micro_batch, lr=1e-3,
                empty_prompt="unread",
            )  # fmt: skip
            setup = replace(setup, processes=processes)
            model, state = moved(setup)
            for i in range(ITERATIONS):
                parameters = list(state.adapter.parameters())
                gradient, metrics = iteration_gradient(setup, model, parameters, i)
                key = f"{str(dtype).removeprefix('torch.')}.{micro_batch}.{i}"
                found[f"gradient.{key}"] = torch.cat([g.flatten() for g in gradient])
                found[f"loss.{key}"] = torch.tensor([metrics["loss"], metrics["cost"]], dtype=torch.float64)
                found[f"q.{key}"] = torch.cat([ot.q for ot in counts[-1].values()], 1)
                found[f"x.{key}"] = processes.gather(pairs[-1].x.detach(), N).contiguous()
                found[f"faces.{key}"] = processes.gather(pairs[-1].faces.has_face.double(), N)
                if dtype == torch.float64:  # float32's rounding would become AdamW's signs
                    update(setup.recipe, state, gradient)
            found[f"end.{key}"] = torch.cat([p.detach().flatten() for p in state.adapter.parameters()])
    if processes.first:
        save_file(found, out)
    processes.stop()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Worlds of 1, 2 and 4 processes -> what they found, with all judges."""
    found, out = {}, tmp_path_factory.mktemp("gradients")
    folder = write_tiny_bundle(tmp_path_factory.mktemp("faces"), faces=True)
    for count in (1, 2, 4):
        code = f"import test_processes as t; t.gradients({str(folder)!r}, {str(out / str(count))!r})"
        codes, said = ends(start(count, "-c", code, stderr=subprocess.PIPE))
        assert codes == [0] * count, said
        found[count] = load_file(out / str(count))
    return found


@pytest.mark.slow
def test_pictures_targets_and_gradients_do_not_depend_on_processes_or_micro_batches(runs):
    whole = runs[1]
    faces = torch.cat([value for name, value in whole.items() if name.startswith("faces")])
    assert 0.2 < faces.mean() < 0.9, "some pictures show a face, some none"
    for count, found in runs.items():
        assert found.keys() == whole.keys()
        for name, value in found.items():
            kind, dtype, _, *i = name.split(".")
            wanted = whole[f"{kind}.{dtype}.0.{i[0]}"]
            tolerance = 1e-10 if dtype == "float64" else 1e-5
            assert float((value - wanted).norm() / wanted.norm()) < tolerance, (count, name)
            assert kind != "gradient" or float(wanted.norm()) > 1e-3


JUDGED = (1, 3)  # prompts: none in the first of two processes, and one more in the second
PAIR_N = (4, 5)  # images: as many in each of two processes, and one more in the second


def pair(folder, place, out=None):
    """What one process does for the tests of two: it gathers, adds, draws, learns and validates, with faces.

    Without torchrun's variables it is the only one, and does the same.
    """
    processes, device = distributed.start(torch.device("cpu"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many processes as cores are at work
    try:
        with pytest.MonkeyPatch.context() as patch:
            found = _pair(patch, processes, device, folder, place)
    finally:
        torch.set_num_threads(threads)
    found = {name: value.contiguous() for name, value in found.items()}
    if out is not None:
        save_file(found, f"{out}{processes.rank}")
    processes.stop()
    return found


def _pair(patch, processes, device, folder, place):
    found = {}
    for count in PAIR_N:
        part = processes.part(count)
        rows = torch.arange(2.0 * count).view(count, 2)[part.start : part.stop]
        found[f"gather.{count}"] = processes.gather(rows, count)
        found[f"total.{count}"] = torch.cat(processes.total([rows.sum(0), torch.tensor([float(len(part))])]))
    found["any"] = torch.tensor([processes.any(processes.rank == r) for r in (0, processes.world - 1, 9)])
    found["share"] = torch.tensor(list(processes.share(f"of process {processes.rank}").encode()))

    def kept(name, **more):
        """What the function of this name returned at each call, some of its arguments set."""
        returned, real = [], partial(getattr(iteration, name), **more)

        def keep(*args, **rest):
            returned.append(real(*args, **rest))
            return returned[-1]

        patch.setattr(iteration, name, keep)
        return returned

    targets = kept("joint_ot", exact_limit=0, tolerance=0.05)
    drawn, noises = kept("draw_pair"), kept("first_noise")
    # of the images of iteration 1, both processes have some with a face and the second some without
    bundle = replace(load_bundle(folder, device, torch.float64), detector=partial(detector, dark=134))
    for count in PAIR_N:
        recipe = {"batch": count, "C": 0.5, "component": "both", "lr": 1e-3, "steps": 2, "rank": 2}
        setup = make_setup(bundle, "gender,skin_tone", **recipe, validate_images=3, eval_steps=2)
        setup = replace(setup, processes=processes, validation=("a photo of a cook", "a photo of a judge"))
        model, state = moved(setup)
        gradient, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 1)
        found[f"noise.{count}"] = processes.gather(noises[-1], count)
        found[f"images.{count}"] = processes.gather(drawn[-1].x.detach(), count)
        found[f"faces.{count}"] = processes.gather(drawn[-1].faces.has_face.double(), count)
        found[f"q.{count}"] = torch.cat([ot.q for ot in targets[-1].values()], 1)
        found[f"gradient.{count}"] = torch.cat([g.flatten() for g in gradient])
        few = replace(setup, recipe=replace(setup.recipe, grad_steps=1))
        some, _ = iteration_gradient(few, model, list(state.adapter.parameters()), 1)
        found[f"drawn terms.{count}"] = torch.cat([g.flatten() for g in some])
        sums = [metrics[name] for name in ("loss", "align", "image", "face", "confident", "faces", "cost")]
        found[f"sums.{count}"] = torch.tensor(sums, dtype=torch.float64)
        update(setup.recipe, state, gradient)
        found[f"end.{count}"] = torch.cat([p.detach().flatten() for p in state.adapter.parameters()])
    seen = start_validation(replace(setup, bundle=replace(bundle, detector=None)))
    measured = [seen.unlike, *seen.measure(model).values()]
    found["validation"] = torch.tensor(measured, dtype=torch.float64)
    settings = EvaluationSettings(bundle, setup.target, Drawing(2, 2.0), 1, processes)
    for count in JUDGED:
        source = drawn_by(settings, model, "")
        judged = judge_prompts(settings, source, [f"a photo of {i} cooks" for i in range(count)], 3)
        rows = [s.tensors() for s in judged]
        for name in rows[0]:
            found[f"judged.{count}.{name}"] = torch.stack([of_prompt[name] for of_prompt in rows])
    found |= _kept(patch, replace(settings, kept=place, bundle=replace(bundle, detector=None)))
    return found


def _kept(patch, settings):
    """What is judged of three prompts, two images of the second being there, and again; how often each drew."""
    drawn, real = [], judging.fixed_images
    patch.setattr(judging, "fixed_images", lambda *args: drawn.append(args[2]) or real(*args))
    several = judging.fixed_images_of
    patch.setattr(judging, "fixed_images_of", lambda *args: drawn.extend(set(args[2])) or several(*args))
    source, prompts, found = drawn_by(settings, settings.bundle, ""), ["a cook", "a judge", "a pilot"], {}
    judge_prompts(settings, source, prompts[1:2], 2)
    for name in ("first", "again"):
        drawn.clear()
        judged = judge_prompts(settings, source, prompts, 3)
        rows = torch.stack([s.probabilities["classifier"]["gender"] for s in judged])
        found |= {f"kept.{name}": rows, f"drawn.{name}": torch.tensor(len(drawn))}
    return found


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What this process alone finds, and each of two."""
    out = tmp_path_factory.mktemp("pair")
    folder = write_tiny_bundle(tmp_path_factory.mktemp("faces"), faces=True)
    of_two = f"{str(folder)!r}, t.Path({str(out / 'kept-2')!r}), {str(out / 'of-')!r}"
    two = start(2, "-c", f"import test_processes as t; t.pair({of_two})", stderr=subprocess.PIPE)
    alone = pair(folder, out / "kept")
    codes, said = ends(two)
    assert codes == [0, 0], said
    return [alone, *(load_file(out / f"of-{rank}") for rank in range(2))]


@pytest.mark.parametrize("count", PAIR_N)
def test_two_processes_gather_rows_in_the_images_order_and_add_up(pairs, count):
    rows = torch.arange(2.0 * count).view(count, 2)
    for found in pairs:
        assert torch.equal(found[f"gather.{count}"], rows)
        assert torch.equal(found[f"total.{count}"], torch.cat([rows.sum(0), torch.tensor([float(count)])]))


def test_two_processes_agree_on_flags_and_texts(pairs):
    for found in pairs:
        assert found["any"].tolist() == [True, True, False]
        assert bytes(found["share"].tolist()) == b"of process 0"


@pytest.mark.parametrize("count", JUDGED)
def test_two_processes_judge_the_images_that_one_does(pairs, count):
    names = {
        *(f"{kind}/classifier/{a}" for kind in ("classes", "probabilities") for a in ("gender", "skin_tone")),
        *("boxes", "features/clip", "features/dino"),
    }
    for found in pairs:
        rows = {
            name.removeprefix(f"judged.{count}."): v
            for name, v in found.items()
            if name.startswith(f"judged.{count}.")
        }
        assert set(rows) == names and all(v.shape[:2] == (count, 3) for v in rows.values())
        for name, v in rows.items():
            torch.testing.assert_close(v, pairs[0][f"judged.{count}.{name}"], equal_nan=True)
    classes = pairs[0][f"judged.{count}.classes/classifier/gender"]
    assert bool((classes >= 0).any())


def test_two_processes_share_out_what_is_not_kept_and_draw_nothing_twice(pairs):
    """Of three prompts one has two of three images there."""
    assert [int(found["drawn.first"]) for found in pairs] == [3, 1, 2]
    for found in pairs:
        assert int(found["drawn.again"]) == 0 and torch.equal(found["kept.again"], found["kept.first"])
        torch.testing.assert_close(found["kept.first"], pairs[0]["kept.first"])


@pytest.mark.parametrize("count", PAIR_N)
@pytest.mark.parametrize("what", ["noise", "images", "faces", "q", "sums", "gradient", "drawn terms", "end"])
def test_an_iteration_of_two_processes_is_that_of_one(pairs, what, count):
    """In float64, and of images that are all different; the targets are drawn, so all processes draw the same."""
    one, *two = (found[f"{what}.{count}"] for found in pairs)
    assert float(one.norm()) > 1e-3
    if what == "drawn terms":
        assert not torch.allclose(one, pairs[0][f"gradient.{count}"], rtol=0.1, atol=0)
    if what in ("noise", "images", "q"):
        assert len(one.unique(dim=0)) > count / 2
    if what == "faces":
        assert one.tolist() == [1, 1, 0, 1, 0][:count]
    for found in two:
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-9 * float(one.abs().max()))
    assert torch.equal(*two)


def test_two_processes_validate_as_one_does(pairs):
    """Three images of each prompt: one in the first process, two in the second."""
    one, *two = (found["validation"] for found in pairs)
    assert bool(one.isfinite().all()) and len(one) == 4
    for found in two:
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)


PIPES = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE}


def command(weights, out, *options):
    common = ["--weights", weights, "--attr", "gender", "--device", "cpu", "--evaluate", "none", "--out", out]
    return [*common, *options]


def launch(count, weights, out, *options, script=ROOT / "train.py", **popen):
    return start(count, script, *command(weights, out, *options), **PIPES, **popen)


def train_that(folder, i, does):
    """A train.py that `does` something in iteration i, between its gradient and its update: what comes then does
    not hang on how fast a run and its observer are."""
    script = Path(folder) / "train_that.py"
    script.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from fairref.commands import cli, train
from fairref.training import loop as trainer
from fairref.training.signals import StopRequest
real, real_ask, asked = trainer.iteration_gradient, StopRequest._ask, []
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

def iteration_gradient(setup, model, parameters, i, watch=None):
    found = real(setup, model, parameters, i, watch)
    if i == {i}:
        {does}
    return found

def ask(*args):
    asked.append(True)
    real_ask(*args)

def until_asked():
    open(f"{folder}/waits-{{rank}}", "w").close()
    while not asked:
        time.sleep(0.01)

trainer.iteration_gradient, StopRequest._ask = iteration_gradient, ask
sys.exit(cli.run(train.main))
""")
    return script


@pytest.mark.slow
def test_two_processes_do_what_one_does(folder, tmp_path):
    """Whole runs, with the evaluation at their end."""
    options = ["--batch", "5", "--iterations", "2", "--evaluate", "ema", "--eval-images-train", "0"]
    for count in (1, 2):
        codes, said = ends(launch(count, folder, tmp_path / str(count), *options))
        assert codes == [0] * count, said
    one, two = (load_file(tmp_path / name / "adapter_raw.safetensors") for name in ("1", "2"))
    begun = new_state(make_setup(load_bundle(folder)))[1].parameters()
    for name in one:
        change = float((one[name] - begun[name].detach()).abs().max())
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-2 * change)
    for a, b in zip(
        *([json.loads(line) for line in lines(tmp_path / name)] for name in ("1", "2")), strict=True
    ):
        assert a["counts"] == b["counts"]
        np.testing.assert_allclose([a["loss"], a["cost"]], [b["loss"], b["cost"]], rtol=1e-4)
        assert b["norm"] == pytest.approx(a["norm"], rel=1e-3)
    evaluations = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("1", "2")]
    assert evaluations[0]["before"] == evaluations[1]["before"]


@pytest.mark.slow
def test_two_processes_judge_as_one_does_with_all_judges(tmp_path):
    """The default bundle's evaluation: three prompts, so that one process has one more."""
    prompts = tmp_path / "prompts.txt"
    jobs = ("nurse", "pilot", "baker")
    prompts.write_text(
        "".join(f"a photo of the face of a {job}, a person\n" for job in jobs), encoding="utf-8"
    )
    options = ["--iterations", "1", "--batch", "3", "--steps", "2"]
    options += ["--validate-every", "0", "--grid-every", "0"]
    options += ["--eval-images", "4", "--evaluate", "ema", "--prompts", prompts]
    for count in (1, 2):
        codes, said = ends(launch(count, ROOT / "weights" / "emoji", tmp_path / str(count), *options))
        assert codes == [0] * count, said
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("1", "2"))
    assert set(one["before"]["train"]["judges"]) == {"classifier", "templates"}
    assert one["before"] == two["before"]
    for name in ("background", "clothes", "clip_i", "dino"):  # of an adapter whose last digits differ
        found, wanted = (of_one["after (ema)"]["train"][name] for of_one in (two, one))
        assert found == pytest.approx(wanted, abs=1e-3), name


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(folder, tmp_path):
    """The command, where the first alone prints and writes; three prompts."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a nurse\na pilot\na baker\n", encoding="utf-8")
    options = ["--weights", folder, "--prompts", prompts, "--part", "train", "-n", "4", "--device", "cpu"]
    for count in (1, 2):
        out = tmp_path / f"{count}.json"
        more = ["--cache", tmp_path / f"kept-{count}", "--out", out]
        processes = start(count, "-m", "fairref", "evaluate", *options, *more, **PIPES)
        printed = outputs(processes, 300)
        assert [process.returncode for process in processes] == [0] * count, printed
        assert str(printed).count("gender bias, 3 train prompts x 4 images") == 1
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert one == two and one["images"] == 4
    rows = [(tmp_path / f"kept-{count}" / "judged.csv").read_text() for count in (1, 2)]
    assert rows[0] == rows[1] and rows[0].count("\n") == 13
    codes, said = ends(
        start(2, "-m", "fairref", "evaluate", *options, "--out", tmp_path / "no" / "x", **PIPES)
    )
    assert codes == [2, 2] and all("its folder doesn't exist" in text for text in said)


def lines(folder):
    path = Path(folder) / "metrics.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def resumed(folder, count=1):
    codes, said = ends(start(count, ROOT / "train.py", "--resume", folder, **PIPES))
    assert codes == [0] * count, said


FILES = ("adapter.safetensors", "adapter_raw.safetensors", "adapter_best.safetensors")
ENDLESS = "1000000"  # iterations: far more than there is time for
LONG = ("--iterations", "12", "--checkpoint-every", "3", "--validate-every", "4", "--validate-images", "3")
LONG += ("--scores", "6")


def adapters(run):
    return {name: (run / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def wholes(folder, tmp_path_factory):
    """Number of processes -> the adapters of a run that nobody disturbed."""
    found = {}
    for count in (1, 2):
        out = tmp_path_factory.mktemp("whole") / "run"
        codes, said = ends(launch(count, folder, out, *LONG))
        assert codes == [0] * count, said
        found[count] = adapters(out)
    return found


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes[1]


@pytest.mark.slow
@pytest.mark.parametrize("after, count", [(1, 1), (4, 1), (8, 1), (5, 2)])
def test_kill_in_the_middle_of_an_iteration(folder, wholes, tmp_path, after, count):
    script = train_that(tmp_path, after, "os.kill(os.getpid(), signal.SIGKILL)")
    codes, said = ends(launch(count, folder, tmp_path / "run", *LONG, script=script))
    assert codes == [-signal.SIGKILL] * count, said
    assert len(lines(tmp_path / "run")) == after
    resumed(tmp_path / "run", count)
    assert adapters(tmp_path / "run") == wholes[count]
    assert [json.loads(line)["iteration"] for line in lines(tmp_path / "run")] == list(range(12))


@pytest.mark.slow
def test_kill_in_the_middle_of_writing_a_checkpoint(folder, whole, tmp_path):
    """The file under its temporary name is whole or half, and the process dies before the renaming."""
    for half in (False, True):
        out = tmp_path / str(half)
        argv = [
            "--weights",
            str(folder),
            "--attr",
            "gender",
            "--device",
            "cpu",
            "--evaluate",
            "none",
            "--out",
            str(out),
        ]
        code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from fairref.commands import train
real = os.replace
def replace(old, new):
    if 'checkpoint-000006' in str(new):
        if {half}:
            os.truncate(old, os.path.getsize(old) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
os.replace = replace
train.main({argv!r} + {list(LONG)!r})
"""
        (process,) = start(1, "-c", code, **PIPES)
        assert ends([process])[0] == [-signal.SIGKILL]
        assert (out / "checkpoint-000006.safetensors.part").exists()
        resumed(out)
        assert adapters(out) == whole
        assert not list(out.glob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_go_on(folder, wholes, tmp_path, number, count):
    # to one of them: they agree
    script = train_that(tmp_path, 2, f"os.kill(os.getpid(), {int(number)}) if rank == world - 1 else None")
    codes, said = ends(launch(count, folder, tmp_path / "run", *LONG, script=script))
    assert codes == [130] * count, said
    done = len(lines(tmp_path / "run"))
    assert done == 3
    assert f"stopped after iteration {done}; go on with --resume {tmp_path / 'run'}" in said[0]
    assert (tmp_path / "run" / f"checkpoint-{done:06d}.safetensors").exists() and "Traceback" not in said[0]
    resumed(tmp_path / "run", count)
    assert adapters(tmp_path / "run") == wholes[count]


@pytest.mark.slow
def test_torchrun_makes_the_same_run_and_hands_signals_on(folder, wholes, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run, script = tmp_path / "run", train_that(tmp_path, 2, "until_asked()")
    processes = start(1, *torchrun, script, *command(folder, run, *LONG), **PIPES)
    wait_for(lambda: len(list(tmp_path.glob("waits-*"))) == 2, processes)
    processes[0].send_signal(signal.SIGTERM)
    codes, (said,) = ends(processes)
    assert codes != [0] and len(lines(run)) == 3, said
    assert "stopped after iteration 3; go on with --resume" in said
    codes, (said,) = ends(start(1, *torchrun, ROOT / "train.py", "--resume", run, **PIPES))
    assert codes == [0], said
    assert adapters(run) == wholes[2]


@pytest.mark.slow
def test_a_slow_checkpoint_is_whole_before_torchrun_ends_all(folder, wholes, tmp_path):
    """torchrun sends SIGTERM to all as soon as one has ended, and a second one within a run ends it at once."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run, script = (
        tmp_path / "run",
        train_that(tmp_path, 2, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)"),
    )
    slow = (
        "save = trainer.checkpoints.save\ntrainer.checkpoints.save = lambda *a: time.sleep(4) or save(*a)\n"
    )
    script.write_text(script.read_text().replace("sys.exit(", f"{slow}sys.exit("))
    options = ["--iterations", "12", "--validate-every", "4", "--validate-images", "3", "--scores", "6"]
    _, (said,) = ends(start(1, *torchrun, script, *command(folder, run, *options), **PIPES))
    assert said.count("stopped after iteration 3; go on with --resume") == 2
    assert (run / "checkpoint-000003.safetensors").exists()
    resumed(run, 2)
    assert adapters(run) == wholes[2]


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_do_not_go_on(folder, tmp_path):
    """As on two machines without a common disk, of which one has an older copy of the run."""
    codes, said = ends(launch(1, folder, tmp_path / "run", *LONG))
    assert codes == [0], said
    script = tmp_path / "resume.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from fairref.commands import cli, train
from fairref.training import checkpoints
saved = checkpoints.saved
if os.environ["RANK"] == "1":
    checkpoints.saved = lambda folder: saved(folder)[:-1]
sys.exit(cli.run(train.main))
""")
    codes, said = ends(start(2, script, "--resume", tmp_path / "run", **PIPES))
    assert codes == [2, 2] and all("checkpoints of iterations from 9 to 12" in one for one in said), said


@pytest.mark.slow
def test_what_pulled_is_the_same_on_two_processes(folder, tmp_path):
    recorded = []
    for count in (1, 2):
        out = tmp_path / str(count)
        codes, said = ends(launch(count, folder, out, "--iterations", "2", "--batch", "5", "--scores", "1"))
        assert codes == [0] * count, said
        recorded.append(read_scores(out))
    for one, two in zip(*recorded, strict=True):
        np.testing.assert_allclose(two.pull, one.pull, rtol=1e-3, atol=1e-5 * one.pull.max())
        # a batch's size decides how sums are rounded, on some processors
        off = np.abs(one.pictures.astype(int) - two.pictures)
        assert off.max() <= 1 and (off > 0).mean() < 0.001
        assert {k: v.tolist() for k, v in one.target.items()} == {
            k: v.tolist() for k, v in two.target.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_others_with_a_message(folder, tmp_path, victim):
    processes = launch(3, folder, tmp_path / "run", "--iterations", ENDLESS, "--batch", "6")
    wait_for(lambda: len(lines(tmp_path / "run")) >= 2, processes)
    processes[victim].kill()
    codes, said = ends(processes, timeout=60)
    for rank in {0, 1, 2} - {victim}:
        assert codes[rank] == 2 and "another process of this run has ended" in said[rank], said[rank]
        assert "Traceback" not in said[rank]


def threads(out):
    """What one process does: its threads' names with the group and after it."""
    processes, _ = distributed.start(torch.device("cpu"))
    assert processes.any(True)
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # imports more of torch

    def names():
        return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]

    with_group = names()
    processes.stop()
    Path(f"{out}-{processes.rank}").write_text(json.dumps([with_group, names()]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    code = f"import test_processes as t; t.threads({str(tmp_path / 'names')!r})"
    codes, said = ends(start(2, "-c", code, stderr=subprocess.PIPE))
    assert codes == [0, 0], said
    for rank in range(2):
        before, after = json.loads((tmp_path / f"names-{rank}").read_text())
        assert any("gloo" in name for name in before) and not any("gloo" in name for name in after)


def test_processes_that_cannot_work_are_refused(folder, monkeypatch):
    setup = make_setup(load_bundle(folder), batch=3)
    assert replace(setup, processes=distributed.Processes(2, 3))
    with pytest.raises(UserError, match="--batch is 3 for 4 processes; give each an image"):
        replace(setup, processes=distributed.Processes(2, 4))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2", **place}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="process 2 of this machine finds 2 GPUs"):
        distributed.start(torch.device("cuda"))


@pytest.mark.parametrize(
    "environment, words",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; expected a whole number from 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '9"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; expected a whole number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29400", "MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
    ],
)
def test_what_is_left_of_torchrun_is_named(monkeypatch, environment, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refused:
        distributed.start(torch.device("cpu"))
    assert f"The environment variable {words}" in str(refused.value) and "torchrun" in str(refused.value)


def test_who_waits_for_others_says_so_and_a_meeting_that_fails_is_one_sentence(monkeypatch, capsys):
    place = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)

    def nobody_comes(*backend, **options):
        time.sleep(0.3)
        raise RuntimeError("timed out\nand more")

    monkeypatch.setattr(distributed, "QUIET", 0.01)
    monkeypatch.setattr(distributed.dist, "init_process_group", nobody_comes)
    with pytest.raises(
        UserError, match=r"WORLD_SIZE is 2, but .* MASTER_PORT 29400 .RuntimeError: timed out.;"
    ):
        distributed.start(torch.device("cpu"))
    waiting = "waiting for 2 processes (WORLD_SIZE) at 127.0.0.1:29400 (MASTER_ADDR, MASTER_PORT)"
    assert waiting in capsys.readouterr().err


def test_a_second_signal_ends_it_at_once(monkeypatch):
    from fairref.training import signals
    from fairref.training.signals import StopRequest

    now = iter((0.0, 0.5, 3.0))  # a terminal's and torchrun's, which are one, and another
    monkeypatch.setattr(signals.time, "monotonic", lambda: next(now))

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_a_folder_in_which_a_run_is_at_work_is_refused(folder, tmp_path):
    """A second process in it would write between the first one's lines. A run that was killed holds nothing."""
    (process,) = launch(1, folder, tmp_path / "run", "--iterations", ENDLESS)
    wait_for(lambda: len(lines(tmp_path / "run")) >= 1, [process])
    for count in (1, 2):
        codes, said = ends(start(count, ROOT / "train.py", "--resume", tmp_path / "run", **PIPES))
        assert codes == [2] * count
        assert all("run: a run or an evaluation is at work in it; end it first." in text for text in said)
    process.kill()
    process.communicate()
    with held(tmp_path / "run"):
        pass


@pytest.mark.slow
def test_stopping_the_queue_of_results_stops_its_run(tmp_path):
    """With a SIGTERM, which a terminal does not send to both as it does Ctrl-C."""
    (tmp_path / "busy.py").write_text(
        "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "while os.getppid() != 1:\n    time.sleep(1)\n"  # until it is stopped, or its parent is gone
    )
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "benchmarks")!r})
import results
results.call({str(tmp_path / "busy.py")!r}, {str(tmp_path / "pid")!r})
print("the queue went on")
"""
    (process,) = start(1, "-c", code, **PIPES)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), [process])
    process.terminate()
    ((out, _),) = outputs([process], timeout=60)
    assert process.returncode != 0 and "the queue went on" not in out
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def skip(folder, out):
    """What one process does: two iterations, the first with a gradient that is infinite in the last process only."""
    processes, device = distributed.start(torch.device("cpu"))
    torch.set_num_threads(1)
    setup = replace(make_setup(load_bundle(folder, device), batch=N), processes=processes)
    model, state = moved(setup)
    real = iteration.sampling_gradient

    def broken(*args):
        found = real(*args)
        if state.iteration == 0 and processes.rank == processes.world - 1:
            found[0][0] = float("inf")
        return found

    iteration.sampling_gradient = broken
    rows = [iterate(setup, model, state) for _ in range(2)]
    ends_at = torch.cat([p.detach().flatten() for p in state.adapter.parameters()])
    row = [state.iteration, state.updates, state.unusable, rows[0]["norm"] is None, rows[1]["skipped"]]
    save_file({"end": ends_at, "row": torch.tensor(list(map(int, row)))}, f"{out}{processes.rank}")
    processes.stop()


@pytest.mark.slow
def test_all_processes_skip_a_gradient_that_is_not_finite_in_one(folder, tmp_path):
    code = f"import test_processes as t; t.skip({str(folder)!r}, {str(tmp_path / 'rank')!r})"
    codes, said = ends(start(2, "-c", code, stderr=subprocess.PIPE))
    assert codes == [0, 0], said
    one, two = (load_file(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert one["row"].tolist() == two["row"].tolist() == [2, 1, 0, 1, 1]
    assert torch.equal(one["end"], two["end"]) and bool(torch.isfinite(one["end"]).all())


# bytes of a file: less than the settings, or than a checkpoint
@pytest.mark.parametrize("room", [700, 40_000])
def test_a_full_disk_ends_a_run_with_one_sentence(folder, tmp_path, room):
    """A limit on the size of a file stands for the disk's."""
    limit = (room, room)
    processes = launch(
        1,
        folder,
        tmp_path / "run",
        *LONG,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    codes, (said,) = ends(processes)
    assert codes == [2] and "Traceback" not in said
    message = said.strip().splitlines()[-1]
    assert "can't be written" in message and "make room" in message
    assert not list((tmp_path / "run").glob("*.safetensors"))
