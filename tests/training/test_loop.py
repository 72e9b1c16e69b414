"""One training iteration is Algorithm A.1, and a run doesn't depend on how it is split or interrupted."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import binom
from tiny_bundle import write_tiny_bundle
from tiny_run import images_by_hand, make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.diffusion.gradient import subsample
from fairref.errors import UserError
from fairref.fairness.attributes import JointTarget
from fairref.fairness.transport import joint_ot
from fairref.generation.adapters import FILE, load_adapter, read_adapter
from fairref.generation.rollout import embed
from fairref.settings import SOFT, Recipe
from fairref.training import checkpoints, loop, step
from fairref.training.checks import check, quiet_batches
from fairref.training.logs import Log
from fairref.training.loop import RAW_FILE, finetune, iterate, learning_rate, new_state, update
from fairref.training.run import train
from fairref.training.step import draw_task, iteration_gradient, prompt_of

ROOT = Path(__file__).parents[2]
SEED = 1  # at which every case of the dynamic weight occurs
ATTRIBUTES = ("gender", "skin_tone")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def bundles(folder):
    return {dtype: load_bundle(folder, dtype=dtype) for dtype in (torch.float32, torch.float64)}


def algorithm_A1(setup, model, i):
    """The loss of iteration i, and which cases of the dynamic weight occurred."""
    bundle, r = setup.bundle, setup.recipe
    K, N = len(setup.target.table), r.batch
    x, o = images_by_hand(setup, model, i)
    (h,) = bundle.classifiers["finetune"]
    logits, original = h(x)["gender"], h(o)["gender"].argmax(1)
    order = sorted(range(N), key=lambda n: -(logits[n, 0] - logits[n, 1]).item())
    q = torch.zeros(N, K, dtype=torch.float64)
    for rank, n in enumerate(order, start=1):
        q[n, 0] = binom.sf(rank - 1, N, 0.5)  # P(at least `rank` images of class 0)
        q[n, 1] = 1 - q[n, 0]
    loss, cases = 0, set()
    cosine = (bundle.clip.encode_image(x) * bundle.clip.encode_image(o)).sum(1)
    for n in range(N):
        y, sure = int(q[n].argmax()), bool(q[n].max() >= r.C)
        same = sure and y == int(original[n])
        cases.add((sure, same))
        loss = loss - (F.log_softmax(logits[n], 0)[y] if sure else 0) / N
        loss = loss + r.lambda_img * (1 if same else r.lambda_2["gender"]) * (1 - cosine[n]) / N
    return loss, cases


@pytest.mark.parametrize(
    "component, end, S",
    [
        ("text_encoder", "zero", 3),
        ("text_encoder", "sigma_min", 16),  # from 15 on, sigma_min ends differently
        ("prefix", "zero", 3),
        ("unet", "zero", 3),
        ("both", "zero", 3),
    ],
)
def test_an_iteration_is_algorithm_A1(bundles, component, end, S):
    setup = make_setup(
        bundles[torch.float64],
        component=component,
        batch=6,
        steps=S,
        lambda_img=5000.0
        if component == "prefix"
        else 50.0,  # a moved prefix changes the tiny pictures little
        guidance=3.0,
        seed=SEED,
        end=end,
    )
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    seen = set()
    for i in (0, 1):
        gradient, metrics = iteration_gradient(setup, model, parameters, i)
        loss, cases = algorithm_A1(setup, model, i)
        expected = torch.autograd.grad(loss, parameters)
        seen |= cases
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-12)
        assert metrics["image"] * setup.recipe.lambda_img > 0.02 * metrics["align"]
        for found, wanted in zip(gradient, expected, strict=True):
            assert found.abs().max() > 1e-6
            torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
    # confident, agreeing: else the test says too little
    assert seen == {
        (True, True),
        (True, False),
        (False, False),
    }


@pytest.mark.parametrize("component, micro_batch", [("text_encoder", 1), ("both", 4)])
def test_micro_batches_change_nothing(bundles, component, micro_batch):
    setup = make_setup(bundles[torch.float64], batch=5, component=component)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    whole, metrics = iteration_gradient(setup, model, parameters, 0)
    parts, metrics_of_parts = iteration_gradient(
        replace(setup, recipe=replace(setup.recipe, micro_batch=micro_batch)), model, parameters, 0
    )
    assert metrics_of_parts["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_guidance_is_drawn_from_its_range(bundles):
    setup = make_setup(bundles[torch.float32], guidance="1:12")
    scales = [draw_task(setup, i).guidance for i in range(200)]
    assert (
        1 <= min(scales) < 1.5 and 11.5 < max(scales) <= 12 and np.mean(scales) == pytest.approx(6.5, abs=0.5)
    )
    assert len(set(scales)) == 200
    fixed = make_setup(bundles[torch.float32], guidance=3)
    assert {draw_task(fixed, i).guidance for i in range(9)} == {3.0}
    model, state = moved(setup)
    _, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 4)
    assert metrics["guidance"] == scales[4]


@pytest.mark.parametrize("component", ["text_encoder", "both"])
def test_the_exact_gradient_is_autograd_through_the_whole_sampler(bundles, component):
    """And no micro-batch changes it."""
    setup = make_setup(
        bundles[torch.float64], gradient="exact", component=component, batch=4, steps=3, seed=SEED
    )
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    gradient, _ = iteration_gradient(setup, model, parameters, 0)
    loss, _ = algorithm_A1(setup, model, 0)
    expected = torch.autograd.grad(loss, parameters)
    few = replace(setup, recipe=replace(setup.recipe, micro_batch=3))
    in_parts, _ = iteration_gradient(few, model, parameters, 0)
    for found, again, wanted in zip(gradient, in_parts, expected, strict=True):
        for one in (found, again):
            torch.testing.assert_close(one, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))
    paper = replace(setup, recipe=replace(setup.recipe, gradient="paper"))
    others = iteration_gradient(paper, model, parameters, 0)[0]
    assert not any(torch.allclose(a, b, rtol=1e-3) for a, b in zip(others, gradient, strict=True))


@pytest.mark.parametrize(
    "name, end",
    [
        ("couple:0.5", "zero"),
        ("last:2", "zero"),
        ("random:4", "zero"),
        ("bernoulli", "zero"),
        ("drtune:2", "sigma_min"),
    ],
)
def test_a_published_gradient_is_autograd_through_its_literal_algorithm(bundles, name, end):
    i, S = 4, 5  # random: the last 4 steps; bernoulli: 1, 3, 4; drtune: 4 steps run, 1 and 3 are kept
    setup = make_setup(bundles[torch.float64], gradient=name, batch=3, steps=S, seed=SEED, end=end)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    gradient, _ = iteration_gradient(setup, model, parameters, i)
    expected = torch.autograd.grad(algorithm_A1(setup, model, i)[0], parameters)
    for found, wanted in zip(gradient, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


def test_several_attributes_at_once(bundles):
    """L_align sums over attributes, and the smallest lambda_2 of those that disagree counts."""
    setup = make_setup(bundles[torch.float64], "gender,skin_tone", batch=8, steps=2, C=0.45, lambda_img=50.0)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())
    task, r, seen = draw_task(setup, 1), setup.recipe, set()
    gradient, metrics = iteration_gradient(setup, model, parameters, 1)
    assert np.shape(metrics["counts"]) == (2, 3) and np.sum(metrics["counts"]) == 8
    x, o = images_by_hand(setup, model, 1)
    (h,) = setup.bundle.classifiers["finetune"]
    logits, of_o = h(x), h(o)
    q = {
        name: ot.q
        for name, ot in joint_ot({name: logits[name] for name in ATTRIBUTES}, task.target.table).items()
    }
    cosine = (setup.bundle.clip.encode_image(x) * setup.bundle.clip.encode_image(o)).sum(1)
    loss = 0
    for n in range(8):
        weights = [1.0]
        for name, share in (("gender", 0.2), ("skin_tone", 0.6)):
            y, sure = int(q[name][n].argmax()), bool(q[name][n].max() >= 0.45)
            loss = loss - (F.log_softmax(logits[name][n], 0)[y] if sure else 0) / 8
            if not (sure and y == int(of_o[name][n].argmax())):
                weights.append(share)
        seen.add(min(weights))
        loss = loss + r.lambda_img * min(weights) * (1 - cosine[n]) / 8
    assert seen == {1.0, 0.2, 0.6}
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-10)
    for found, wanted in zip(gradient, torch.autograd.grad(loss, parameters), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


def test_a_prompt_that_names_one_attribute_leaves_the_other_as_it_is_in_that_class(bundles):
    target = JointTarget(
        {"gender": ("woman", "man"), "age": ("young", "old")}, np.array([[0.4, 0.1], [0.2, 0.3]])
    )
    np.testing.assert_allclose(target.given("gender", 1).table, [[0, 0], [0.4, 0.6]])
    np.testing.assert_allclose(target.given("age", 0).table, [[2 / 3, 0], [1 / 3, 0]])
    none = JointTarget(target.classes, np.array([[0, 0], [0.25, 0.75]]))
    np.testing.assert_allclose(none.given("gender", 0).table, [[0.25, 0.75], [0, 0]])


def cache_of_one(function):
    kept = []
    return lambda *args: kept[0] if kept else kept.append(function(*args)) or kept[0]


def test_the_gradient_may_take_a_few_steps_only(bundles, monkeypatch):
    setup = make_setup(bundles[torch.float64], batch=3, steps=6)
    model, state = moved(setup)
    parameters = list(state.adapter.parameters())

    def with_steps(n):
        return replace(setup, recipe=replace(setup.recipe, grad_steps=n))

    whole, metrics = iteration_gradient(setup, model, parameters, 0)
    for enough in (6, 9):
        same, _ = iteration_gradient(with_steps(enough), model, parameters, 0)
        assert all(torch.equal(a, b) for a, b in zip(same, whole, strict=True))

    few, metrics_of_few = iteration_gradient(with_steps(2), model, parameters, 0)
    assert metrics_of_few == metrics  # the pictures and the loss are the same
    assert any(not torch.allclose(a, b) for a, b in zip(few, whole, strict=True))
    for drawing in ("sample_path", "draw_pair"):  # that they are the same was just seen: they are drawn once
        monkeypatch.setattr(step, drawing, cache_of_one(getattr(step, drawing)))
    seen = []
    for u in ((np.arange(40) + 0.5) / 40).tolist():
        monkeypatch.setattr(step, "subsample", lambda w, M, _, size, u=u: subsample(w, M, u, size))
        seen.append(iteration_gradient(with_steps(2), model, parameters, 0)[0])
    means = [torch.stack(g).mean(0) for g in zip(*seen, strict=True)]
    for mean, b in zip(means, whole, strict=True):
        assert float((mean - b).norm() / b.norm()) < 0.05  # a grid of 40 draws, not all of them


@pytest.mark.parametrize("component", ["text_encoder", "both", "prefix"])
def test_kept_graphs_change_nothing_but_what_is_evaluated(bundles, monkeypatch, component):
    setup = make_setup(bundles[torch.float64], batch=3, steps=4, component=component, micro_batch=2)
    model, state = moved(setup)
    parameters, evaluated = list(state.adapter.parameters()), []
    real = type(model.unet).forward
    monkeypatch.setattr(
        type(model.unet), "forward", lambda self, z, t, c: evaluated.append(len(z)) or real(self, z, t, c)
    )

    def found(**changes):
        evaluated.clear()
        changed = replace(setup, recipe=replace(setup.recipe, **changes))
        return *iteration_gradient(changed, model, parameters, 0), sum(evaluated)

    gradient, metrics, rows = found()
    kept, same, fewer = found(keep_graphs=True)
    one = (
        3 * 4
    )  # images and steps, of one branch: the path and the frozen one have two, the VJPs of a prefix one
    assert (rows, fewer) == ((5 if component == "prefix" else 6) * one, 4 * one)
    assert same.pop("loss") == pytest.approx(metrics.pop("loss"), rel=1e-12)
    assert component == "prefix" or same == metrics  # a prefix's branches are evaluated one at a time
    for a, b in zip(kept, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_a_frozen_empty_prompt_has_no_part_in_the_gradient(bundles, tmp_path):
    """c_empty is the base's, and the gradient that of c alone; the adapter's file says so, and its reader follows."""
    bundle = bundles[torch.float64]
    setup = make_setup(
        bundle, batch=2, steps=2, empty_prompt="frozen", iterations=1, lr=0.1, validate_every=0
    )
    model, state = moved(setup)
    prompt, parameters = draw_task(setup, 0).prompt, list(state.adapter.parameters())
    text = embed(model, prompt)
    torch.testing.assert_close(text[1], embed(bundle, prompt)[1])
    assert not torch.allclose(text[0], embed(bundle, prompt)[0])
    assert all(
        g is None or not g.any() for g in torch.autograd.grad(text[1].sum(), parameters, allow_unused=True)
    )
    finetune(setup, tmp_path, {"empty_prompt": "frozen", "base": bundle.fingerprints})
    c, c_empty = embed(load_adapter(bundle, tmp_path), prompt)
    torch.testing.assert_close(c_empty, embed(bundle, prompt)[1])
    assert not torch.equal(c, embed(bundle, prompt)[0])


@pytest.mark.parametrize(
    ("recipe", "leaves"),
    [
        ({"empty_prompt": "frozen"}, True),
        ({"component": "both", "empty_prompt": "frozen"}, True),
        ({}, False),
        ({"component": "prefix"}, False),
    ],
)
def test_the_files_of_a_run_say_whether_they_leave_the_empty_prompt(loaded_tiny, tmp_path, recipe, leaves):
    folder = train(loaded_tiny, "gender", tmp_path / "run", iterations=1, evaluate="none", **recipe)
    for file in (FILE, RAW_FILE):
        assert read_adapter(folder / file).leaves_empty == leaves


def test_at_the_start_both_models_draw_the_same_and_nothing_is_drawn_twice(bundles, monkeypatch):
    setup = make_setup(bundles[torch.float32])
    runs = []
    real = step.rollout
    monkeypatch.setattr(step, "rollout", lambda *args: runs.append(real(*args)) or runs[-1])
    model, state = new_state(setup)
    _, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 0)
    assert len(runs) == 1 and abs(metrics["image"]) < 1e-6
    model, state = moved(setup)
    _, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 0)
    assert len(runs) == 3 and metrics["image"] > 1e-5


def test_only_the_adapter_takes_a_gradient(bundles):
    setup = make_setup(bundles[torch.float32])
    model, state = moved(setup)
    assert sum(p.requires_grad for p in model.text_encoder.parameters()) == len(
        list(state.adapter.parameters())
    )
    iteration_gradient(setup, model, list(state.adapter.parameters()), 0)
    assert model.unet is setup.bundle.unet
    bundle = setup.bundle
    networks = (bundle.unet, bundle.vae, bundle.clip, *bundle.classifiers["finetune"])
    assert all(p.grad is None and not p.requires_grad for network in networks for p in network.parameters())


def test_each_component_takes_its_own_gradient_and_leaves_none_behind(bundles):
    for component, parts in {
        "unet": {"unet"},
        "both": {"unet", "text_encoder"},
        **{component: {component} for component in SOFT},
    }.items():
        setup = make_setup(bundles[torch.float32], component=component)
        model, state = moved(setup)
        names, parameters = zip(*state.adapter.named_parameters(), strict=True)
        assert {name.split(".")[0] for name in names} == parts
        gradient, _ = iteration_gradient(setup, model, parameters, 0)
        assert all(g.abs().max() > 0 for g in gradient) and all(p.grad is None for p in parameters)
        networks = (setup.bundle.unet, setup.bundle.text_encoder)
        assert not any(p.requires_grad for network in networks for p in network.parameters())


def test_more_than_two_classes(bundles):
    setup = make_setup(bundles[torch.float32], "skin_tone=0.5,0.25,0.25", batch=5, C=0.5)
    assert setup.recipe.lambda_2 == {"skin_tone": 0.6}
    model, state = moved(setup)
    gradient, metrics = iteration_gradient(setup, model, list(state.adapter.parameters()), 0)
    assert sum(metrics["counts"]) == 5 and len(metrics["counts"]) == 3
    assert all(torch.isfinite(g).all() for g in gradient)


def test_every_epoch_takes_each_prompt_once():
    epochs = [[prompt_of(7, e * 10 + i, 10) for i in range(10)] for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [prompt_of(8, i, 10) for i in range(10)]


def test_every_third_prompt_names_a_class_which_is_its_target(bundles):
    setup = make_setup(bundles[torch.float64], explicit_every=3, batch=5, steps=2)
    classes = setup.target.classes["gender"]
    explicit = tuple((f"{name} {n}", "gender", k) for n in range(4) for k, name in enumerate(classes))
    setup = replace(setup, explicit=explicit)
    tasks = [draw_task(setup, i) for i in range(24)]
    assert [task.explicit for task in tasks] == [False, False, True] * 8
    asked = sorted(task.prompt for task in tasks if task.explicit)
    assert asked == sorted(prompt for prompt, *_ in explicit)  # each once in an epoch
    for task in tasks:
        k = classes.index(task.prompt.split()[0]) if task.explicit else None
        assert task.target.table.tolist() == ([k == 0, k == 1] if task.explicit else [0.5, 0.5])
    plain = replace(setup, recipe=replace(setup.recipe, explicit_every=0))
    neutral = [task.prompt for task in tasks if not task.explicit]
    assert neutral == [draw_task(plain, i).prompt for i in range(16)]
    assert [draw_task(replace(setup, explicit=()), i).prompt for i in range(16)] == neutral


def test_the_loss_of_an_explicit_prompt_is_the_cross_entropy_of_its_class(bundles):
    """Of one image, whose two classes' probabilities exp(-L_align) sum to 1."""
    setup = make_setup(bundles[torch.float64], explicit_every=1, batch=1, C=0.5, steps=2)
    found = []
    for k in range(2):
        one = replace(setup, explicit=(("a person", "gender", k),))
        model, state = new_state(one)
        found.append(iteration_gradient(one, model, list(state.adapter.parameters()), 0)[1])
    assert all(metrics["confident"] == 1 and "bias" not in metrics for metrics in found)
    probability = [np.exp(-metrics["align"]) for metrics in found]
    assert sum(probability) == pytest.approx(1, abs=1e-9)
    assert found[0]["counts"][int(np.argmax(probability))] == 1


@pytest.mark.parametrize("count, group", [(10, 2), (7, 3), (4, 9), (1, 2)])
def test_groups_of_prompts_stay_together(count, group):
    for epoch in range(3):
        order = [prompt_of(3, epoch * count + i, count, group) for i in range(count)]
        assert sorted(order) == list(range(count))
        starts = [p for p in order if p % group == 0]
        together = [q for p in starts for q in range(p, min(p + group, count))]
        assert order == together
    assert [prompt_of(3, i, 10, 1) for i in range(10)] == [prompt_of(3, i, 10) for i in range(10)]
    shuffled = {tuple(prompt_of(3, e * 10 + i, 10, 2) for i in range(0, 10, 2)) for e in range(5)}
    assert len(shuffled) > 1


def test_step_counts_cover_their_range_and_follow_from_the_seed(bundles):
    setup = make_setup(bundles[torch.float32], steps="3:5")
    counts = [draw_task(setup, i).S for i in range(100)]
    assert set(counts) == {3, 4, 5}
    other = replace(setup, recipe=replace(setup.recipe, seed=1))
    assert counts != [draw_task(other, i).S for i in range(100)]


def test_learning_rate(bundles):
    recipe = make_setup(bundles[torch.float32], lr=1.0, lr_end=0.1, warmup=4, iterations=100).recipe
    assert learning_rate(recipe, 0) == 0.25
    assert learning_rate(recipe, 100) == pytest.approx(0.1)
    assert learning_rate(recipe, 50) == pytest.approx(0.55)
    assert learning_rate(replace(recipe, lr_end=1.0, warmup=0), 77) == 1.0


def test_an_update_is_a_clipped_adamw_step_and_a_moving_average(bundles):
    setup = make_setup(bundles[torch.float32], lr=0.01, clip=2.0, ema=0.5)
    _, state = new_state(setup)
    before = [p.detach().clone() for p in state.adapter.parameters()]
    gradient = [torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) for p in before]
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradient))
    assert norm > 2
    twins = [p.clone().requires_grad_() for p in before]
    twin = torch.optim.AdamW(twins, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    for p, g in zip(twins, gradient, strict=True):
        p.grad = g * 2 / norm
    twin.step()
    found, taken = update(setup.recipe, state, gradient)
    assert taken and found == pytest.approx(norm, rel=1e-5)
    decay = 2 / 11  # of the first update, far below 0.5
    for (name, p), wanted, start in zip(state.adapter.named_parameters(), twins, before, strict=True):
        torch.testing.assert_close(p, wanted, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(state.ema[name], decay * start + (1 - decay) * p, rtol=1e-5, atol=1e-7)
    # a step of AdamW alone hardly shows the gradient's scale
    for p, g in zip(state.adapter.parameters(), gradient, strict=True):
        torch.testing.assert_close(state.optimizer.state[p]["exp_avg"], 0.1 * g * 2 / norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("resumed", [False, True], ids=["in one go", "resumed after each"])
@pytest.mark.parametrize("clip", [0.0, 2.0])
def test_updates_are_adamw_by_hand(bundles, tmp_path, clip, resumed):
    """Every setting of the optimizer differs from every other one. The rate follows the iterations, a gradient that
    is not finite takes one; Adam's bias correction and the average's decay follow the updates."""
    lr, lr_end, warmup, iterations, beta_1, beta_2 = 0.02, 0.3, 3, 9, 0.8, 0.95
    eps, weight_decay, ema = 1e-3, 0.4, 0.35
    setup = make_setup(
        bundles[torch.float64],
        rank=1,
        iterations=iterations,
        clip=clip,
        ema=ema,
        lr=lr,
        lr_end=lr_end,
        warmup=warmup,
        beta_1=beta_1,
        beta_2=beta_2,
        adam_eps=eps,
        weight_decay=weight_decay,
    )
    _, state = new_state(setup)
    x = torch.cat([p.detach().flatten() for p in state.adapter.parameters()])
    m, v, mean, updates = torch.zeros_like(x), torch.zeros_like(x), x.clone(), 0
    generator = torch.Generator().manual_seed(3)
    for i, norm in enumerate([0.5, 7.0, math.inf, 1.5, 40.0, 1e-3]):  # shorter and longer than `clip`
        g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        g = g / g.norm() * norm
        pieces = g.split([p.numel() for p in state.adapter.parameters()])
        pieces = [piece.view(p.shape) for piece, p in zip(pieces, state.adapter.parameters(), strict=True)]
        found, taken = update(setup.recipe, state, pieces)
        assert taken == math.isfinite(norm) and (not taken or found == pytest.approx(norm, rel=1e-9))
        if taken:
            updates += 1
            g = g * 2 / norm if clip and norm > 2 else g
            rate = lr * min(1, (i + 1) / 3) * (0.3 + 0.7 * (1 + math.cos(math.pi * i / 9)) / 2)
            x = x - rate * weight_decay * x
            m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
            x = x - rate * (m / (1 - beta_1**updates)) / ((v / (1 - beta_2**updates)).sqrt() + eps)
            decay = min(ema, (1 + updates) / (10 + updates))
            mean = decay * mean + (1 - decay) * x
        if resumed:
            checkpoints.save(tmp_path, state)
            _, state = new_state(setup)
            checkpoints.restore(tmp_path, state)
        assert (state.iteration, state.updates) == (i + 1, updates)
        ours = torch.cat([p.detach().flatten() for p in state.adapter.parameters()])
        torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-12)
        average = torch.cat([state.ema[name].flatten() for name in state.parameters()])
        torch.testing.assert_close(average, mean, rtol=1e-9, atol=1e-12)
    assert ema > 2 / 11 and ema < 6 / 15  # both decays occurred


def test_all_numbers_of_a_state_come_back_from_its_checkpoint(bundles, tmp_path):
    """Each unlike the others and unlike its start; the tensors are compared bit for bit."""
    setup = make_setup(bundles[torch.float32])
    _, state = moved(setup)
    update(setup.recipe, state, [torch.ones_like(p) for p in state.adapter.parameters()])
    best = {"iteration": 8, "bias": 0.25, "clip_i": 0.5, "kept": 0.75}
    numbers = {"iteration": 9, "updates": 7, "best": best, "streak": 3, "unusable": 2}
    assert {f.name for f in fields(state)} == {*numbers, "adapter", "ema", "optimizer"}, "a number more"
    for name, value in numbers.items():
        setattr(state, name, value)
    checkpoints.save(tmp_path, state)
    _, other = new_state(setup)
    checkpoints.restore(tmp_path, other)
    assert {name: getattr(other, name) for name in numbers} == numbers
    for (name, p), q in zip(state.parameters().items(), other.parameters().values(), strict=True):
        assert torch.equal(p, q) and torch.equal(state.ema[name], other.ema[name])
        of_p, of_q = state.optimizer.state[p], other.optimizer.state[q]
        assert float(of_q["step"]) == 7 and of_p.keys() == of_q.keys()
        assert all(torch.equal(of_p[key], of_q[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_unusable_gradients_in_a_row_end_a_run_also_across_a_resume(bundles, tmp_path, monkeypatch):
    """And a usable one between them starts the count again."""
    setup, usable = make_setup(bundles[torch.float32], rank=1), {1}

    def gradient(setup, model, parameters, i, watch):
        return [torch.full_like(p, 1.0 if i in usable else torch.inf) for p in parameters], {}

    monkeypatch.setattr(loop, "iteration_gradient", gradient)
    model, state = new_state(setup)
    counts = []
    for _ in range(3):
        iterate(setup, model, state)
        counts.append(state.unusable)
    assert counts == [1, 0, 1]
    for _ in range(10):
        iterate(setup, model, state)
    checkpoints.save(tmp_path, state)
    model, state = new_state(setup)
    checkpoints.restore(tmp_path, state)
    for _ in range(8):
        iterate(setup, model, state)
    assert (state.unusable, state.updates) == (19, 1)
    with pytest.raises(UserError, match="20 gradients in a row were not finite"):
        iterate(setup, model, state)


def test_a_gradient_that_is_not_finite_is_skipped(bundles):
    setup = make_setup(bundles[torch.float32])
    _, state = new_state(setup)
    before = [p.detach().clone() for p in state.adapter.parameters()]
    gradient = [torch.ones_like(p) for p in before]
    gradient[3][0, 0] = torch.inf
    _, taken = update(setup.recipe, state, gradient)
    assert not taken and (state.iteration, state.updates) == (1, 0)
    assert all(torch.equal(p, b) for p, b in zip(state.adapter.parameters(), before, strict=True))


def test_an_update_beyond_all_numbers_ends_a_run_before_anything_is_saved(bundles, tmp_path, monkeypatch):
    recipe = {"lr": 1e6, "weight_decay": 1e6, "iterations": 30, "checkpoint_every": 1}
    setup = make_setup(bundles[torch.float32], rank=1, **recipe)
    monkeypatch.setattr(
        loop, "iteration_gradient", lambda s, m, ps, i, watch: ([torch.ones_like(p) for p in ps], {})
    )
    with pytest.raises(
        UserError, match=r"iteration \d+ brought adapter.* beyond all numbers, and is not saved"
    ):
        finetune(setup, tmp_path, {})
    for file in tmp_path.glob("*.safetensors"):
        assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(file).values()), file
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_run_whose_gradients_were_all_skipped_has_failed(bundles, tmp_path, monkeypatch):
    setup = make_setup(bundles[torch.float32], rank=1, iterations=3)
    monkeypatch.setattr(
        loop,
        "iteration_gradient",
        lambda s, m, ps, i, watch: ([torch.full_like(p, math.nan) for p in ps], {}),
    )
    with pytest.raises(UserError, match="none of 3 gradients was finite, so nothing was trained"):
        finetune(setup, tmp_path, {})
    assert not (tmp_path / "adapter.safetensors").exists()


def test_a_run_whose_images_show_no_face_says_so_once(bundles, tmp_path, capsys):
    setup = make_setup(bundles[torch.float32])
    state = new_state(setup)[1]
    with Log(setup, tmp_path, state) as log:
        for i, faces in enumerate([0.0] * 19 + [0.25] + [0.0] * 50):
            log.add({"iteration": i, "faces": faces}, state)
            said = "no image of the last 20 iterations shows a face" in capsys.readouterr().err
            assert said == (i == 39), i
        for i in range(30):
            log.add({"iteration": i}, state)  # without a detector
    assert "shows a face" not in capsys.readouterr().err


@pytest.mark.parametrize("empty_prompt", ["trained", "unread"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(bundles, tmp_path, monkeypatch, empty_prompt):
    setup = make_setup(bundles[torch.float32], iterations=4, checkpoint_every=2, empty_prompt=empty_prompt)
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    for folder in folders:
        folder.mkdir()
    finetune(setup, folders[0], {})
    real = checkpoints.append_metrics

    def stop_in_the_fourth(folder, metrics):
        if metrics["iteration"] == 3:
            raise KeyboardInterrupt
        real(folder, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "append_metrics", stop_in_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            finetune(setup, folders[1], {})
    finetune(setup, folders[1], {})
    for file in ("adapter.safetensors", "adapter_raw.safetensors", "checkpoint-000004.safetensors"):
        whole, interrupted = (load_file(folder / file) for folder in folders)
        assert whole.keys() == interrupted.keys()
        assert all(torch.equal(whole[name], interrupted[name]) for name in whole)
    lines = [
        [json.loads(line) for line in (f / checkpoints.METRICS).read_text().splitlines()] for f in folders
    ]
    assert [m["iteration"] for m in lines[1]] == [0, 1, 2, 3]
    assert [m["loss"] for m in lines[0]] == [m["loss"] for m in lines[1]]
    assert not list(folders[1].glob("*.part"))


def test_a_checkpoint_of_another_rank_is_refused(bundles, tmp_path):
    _, state = new_state(make_setup(bundles[torch.float32], rank=2))
    checkpoints.save(tmp_path, state)
    _, other = new_state(make_setup(bundles[torch.float32], rank=3))
    with pytest.raises(UserError, match=r"checkpoint-000000\.safetensors"):
        checkpoints.restore(tmp_path, other)


def test_a_run_says_which_batches_ask_for_nothing(bundles):
    bundle = bundles[torch.float32]

    def said(attribute="gender", **recipe):
        setup = make_setup(bundle, attribute, batch=24, **recipe)
        return quiet_batches(setup)

    assert said() == ["gender: of 24 images, with 10 to 14 of each, nobody is asked to change (C = 0.8)"]
    gender, tone = said("gender,skin_tone", C=0.5)
    assert gender.startswith("gender: of 24 images, with 12 to 12 of each") and "with about" in tone
    setup = make_setup(bundle, batch=24)
    uneven = replace(setup, target=JointTarget(setup.target.classes, np.array([0.3, 0.7])))
    assert quiet_batches(uneven) == [
        "gender: of 24 images, with 5 to 9 woman, 15 to 19 man, nobody is asked to change (C = 0.8)"
    ]
    assert said(targets="random") == said(targets="soft") == said(None, lambda_text=1.0) == []


def test_what_a_bundle_lacks_is_said(bundles):
    setup = make_setup(bundles[torch.float32])
    check(setup)
    with pytest.raises(UserError, match="has no clip, which the loss's term 'image' needs"):
        check(replace(setup, bundle=replace(setup.bundle, clip=None)))
    with pytest.raises(UserError, match=r"has no classifiers\.finetune, which the loss's term 'align' needs"):
        check(replace(setup, bundle=replace(setup.bundle, classifiers={})))


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path):
    """Not a user's copy of one, nor what a killed process left under a temporary name."""
    names = ["checkpoint-000100-copy", "checkpoint-000100", "checkpoint-000020", "checkpoint-best"]
    for name in names:
        (tmp_path / f"{name}.safetensors").touch()
    (tmp_path / "checkpoint-000200.safetensors.part").touch()
    found = [path.stem for path in checkpoints.saved(tmp_path)]
    assert found == ["checkpoint-000020", "checkpoint-000100"]


def test_metrics_are_json_whatever_is_in_them(tmp_path):
    checkpoints.append_metrics(tmp_path, {"loss": float("nan"), "validation": {"bias": -math.inf}, "S": 3})
    line = (tmp_path / checkpoints.METRICS).read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "loss": None,
        "validation": {"bias": None},
        "S": 3,
    }


@pytest.mark.parametrize("rest, lacks", [(0.0, False), (0.066, False), (0.064, True)])
def test_a_class_too_rare_for_a_confident_target_is_refused(bundles, rest, lacks):
    """Of 24 images the likeliest is of a class of share s with 1 - (1 - s)^24, which is .8 at s = .0649."""
    setup = make_setup(bundles[torch.float32], batch=24)
    setup = replace(setup, target=JointTarget({"gender": ("woman", "man")}, np.array([1 - rest, rest])))
    if not lacks:
        return check(setup)
    message = r"no target is man, which has 0\.064 of gender, as surely as C = 0\.8"
    with pytest.raises(UserError, match=message):
        check(setup)
    for other in ({"targets": "soft"}, {"targets": "random"}):  # it is not about these
        check(replace(setup, recipe=replace(setup.recipe, **other)))
    with pytest.raises(
        UserError, match=r"no target is other than woman, which has 0\.064 of gender, as surely"
    ):
        check(replace(setup, recipe=replace(setup.recipe, threshold="leave")))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"keep_graphs": True, "grad_steps": 1}, "keep_graphs has no effect with grad_steps"),
        ({"threshold": "leave", "C": 0.5}, "C above .5"),
        ({"threshold": "leave", "targets": "soft"}, "takes targets of transport"),
    ],
)
def test_settings_that_are_at_odds_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        Recipe(**wrong)


@pytest.mark.parametrize("gradient", ["exact", "couple:0.5", "bernoulli"])
def test_a_bundles_drawn_steps_leave_gradients_with_coupling_alone(bundles, gradient):
    found = []
    for grad_steps in (0, 1):
        setup = make_setup(bundles[torch.float64], batch=2, steps=3, gradient=gradient, grad_steps=grad_steps)
        model, state = moved(setup)
        found.append(iteration_gradient(setup, model, list(state.adapter.parameters()), 0)[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
