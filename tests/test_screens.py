"""The scripts behind the recipe: what a way of training changes, and that the numbers of a screen are what they say."""

import re
from dataclasses import replace

import antithetic
import guidance_drift
import iteration
import measure
import numpy as np
import prefix_limits
import pytest
import screen
import time_to_bias
import torch
import variants
from scipy.special import expit
from scipy.stats import norm

from fairref.errors import UserError
from fairref.files.paths import read_json
from fairref.files.weights import read
from fairref.generation import lora
from fairref.generation.adapters import FILE, save_adapter
from fairref.generation.rollout import embed
from fairref.training import loop, run, step, terms
from fairref.training.run import train

PATCHED = (
    *((loop, name) for name in ("iteration_gradient", "new_state", "update", "iterate")),
    *((step, name) for name in ("draw_task", "image_gradient", "draw_pair")),
    *((terms, "terms_of"), (lora, "first_tokens"), (run, "finetune")),
)


SHARES = np.linspace(0.2, 0.8, 200)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for module, name in PATCHED:
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(terms.TERMS, "image", terms.TERMS["image"])


@pytest.fixture
def setup(loaded_tiny):
    return measure.setup_of(loaded_tiny, batch=4, steps=3, clip=0.0, grad_steps=0, lambda_img=2.0)


def gradient_of(setup, i=0):
    """Of an adapter that already does something."""
    model, state = measure.adapted(setup)
    gradient, metrics = loop.iteration_gradient(setup, model, list(state.adapter.parameters()), i)
    return torch.cat([g.flatten() for g in gradient]).double(), metrics


def test_shortening_the_pull_alone_leaves_the_other_terms_as_they_are(setup, monkeypatch):
    whole, plain = gradient_of(setup)
    variants.put("align=1e9")
    same, said = gradient_of(setup)
    torch.testing.assert_close(same, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))
    assert {name: said[name] for name in ("align", "image", "loss")} == pytest.approx(
        {name: plain[name] for name in ("align", "image", "loss")}, rel=1e-5
    )
    found = {}
    for longest in (1e-30, said["align_norm"] / 4, said["align_norm"] / 2):
        variants.align(longest)
        found[longest], _ = gradient_of(setup)
    none, quarter, half = found.values()
    torch.testing.assert_close(
        half - none, 2 * (quarter - none), rtol=1e-3, atol=1e-6 * float(whole.abs().max())
    )
    assert float((half - none).norm()) == pytest.approx(said["align_norm"] / 2, rel=1e-3)
    assert float(none.norm()) > 0


def test_an_image_pulls_no_longer_than_it_may(setup):
    kept, plain = step.image_gradient, []

    def seen(*of):
        plain.append(kept(*of)[0])
        return kept(*of)

    step.image_gradient = seen
    whole, _ = gradient_of(setup)
    lengths = plain[0].flatten(1).norm(dim=1)
    variants.image(1e9)
    torch.testing.assert_close(gradient_of(setup)[0], whole)
    step.image_gradient, limit = kept, float(lengths.median())
    variants.image(limit)
    step.image_gradient, shortened = (
        (lambda *of: (found.append(shortened(*of)[0]), shortened(*of))[1]),
        step.image_gradient,
    )
    found = []
    gradient_of(setup)
    torch.testing.assert_close(found[0].flatten(1).norm(dim=1), lengths.clamp(max=limit))


def test_the_originals_may_be_drawn_in_some_iterations_alone(setup):
    """Where they are due L_img weighs so many times as much; elsewhere the rest of the loss is left."""
    plain = [gradient_of(setup, i)[0] for i in (0, 1)]
    without = [
        gradient_of(replace(setup, recipe=replace(setup.recipe, lambda_img=0.0)), i)[0] for i in (0, 1)
    ]
    variants.put("every=2")
    (due, said), (rest, said_rest) = (gradient_of(setup, i) for i in (0, 1))
    near = {"rtol": 1e-3, "atol": 1e-5 * float(plain[0].abs().max())}
    torch.testing.assert_close(due - without[0], 2 * (plain[0] - without[0]), **near)
    torch.testing.assert_close(rest, without[1], **near)
    assert said["image"] != 0 and said_rest["image"] == 0


def test_a_step_for_several_prompts_is_that_of_their_mean(setup):
    """Each shortened to `clip` first."""
    recipe = replace(setup.recipe, clip=0.5)

    def moved(update, gradients):
        _, state = loop.new_state(setup)
        for g in gradients:
            update(recipe, state, g)
        return state

    start = loop.new_state(setup)[1].parameters()
    gradients = [[torch.full_like(p, scale) for p in start.values()] for scale in (3.0, -1.0, -1.0)]
    lengths = [float(torch.cat([part.flatten() for part in g]).norm()) for g in gradients]
    mean = [
        sum(part * min(1, 0.5 / length) for part, length in zip(parts, lengths, strict=True)) / 3
        for parts in zip(*gradients, strict=True)
    ]
    plain = loop.update
    variants.summed(3)
    found = moved(loop.update, gradients)
    assert (found.iteration, len(found.optimizer.state)) == (3, len(start))
    expected = moved(lambda recipe, state, g: plain(replace(recipe, clip=0.0), state, g), [mean])
    for name, p in expected.parameters().items():
        torch.testing.assert_close(found.parameters()[name], p)
    _, resumed = loop.new_state(setup)
    resumed.iteration = 3
    variants.summed(3)
    with pytest.raises(UserError, match="can't be resumed"):
        loop.update(recipe, resumed, gradients[0])


def test_the_up_matrices_have_a_rate_of_their_own(setup):
    def moved():
        _, state = loop.new_state(setup)
        before = {name: p.detach().clone() for name, p in state.parameters().items()}
        loop.update(setup.recipe, state, [torch.ones_like(p) for p in state.parameters().values()])
        return {
            name: float((p - before[name]).detach().abs().mean()) for name, p in state.parameters().items()
        }

    plain = moved()
    variants.up(8.0)
    for name, length in moved().items():
        ratio = (
            8 if name.endswith("lora_up.weight") else 1
        )  # AdamW's first step is lr a number, but for the decay
        assert length == pytest.approx(ratio * plain[name], rel=1e-2), name


def test_prompts_that_lean_come_again_with_their_neighbours(setup):
    """What iterations before measured alone decides, whatever a stopped run has left behind."""
    prompts = tuple(f"a photo of a cook, number {n}" for n in range(32))
    setup = replace(setup, prompts=(prompts,))
    measured = iter([{"iteration": i, "prompt": prompts[i], "bias": i / 100} for i in range(32)])
    loop.iterate = lambda: next(measured)
    plain = [step.draw_task(setup, i).prompt for i in range(400)]
    variants.replay(1.0)
    for _ in prompts:
        loop.iterate()
    drawn = [step.draw_task(setup, i).prompt for i in range(400)]
    assert drawn[:16] == plain[:16]  # too few are known
    assert drawn[16] in prompts[14:16]  # of 16 the last two
    assert set(drawn[32:]) == set(prompts[28:])  # the last four, which are two pairs of neighbours
    bias = dict(zip(prompts, range(32), strict=True))
    assert np.mean([bias[prompt] % 2 for prompt in drawn[32:]]) == pytest.approx(0.5, abs=0.1)


def test_it_is_said_how_many_images_are_asked_to_change(setup):
    variants.asked(1)
    seen = []
    _, metrics = gradient_of(setup)
    model, state = measure.adapted(setup)
    whole = step.iteration_gradient
    whole(setup, model, list(state.adapter.parameters()), 0, lambda *parts: seen.append(parts))
    (_, _, pair, q, *_) = seen[0]
    shown = setup.classify(pair.x, pair.faces)["gender"].argmax(1)
    sure = q["gender"].max(1).values >= setup.recipe.C
    assert metrics["asked"] == int((sure & (q["gender"].argmax(1) != shown)).sum())


def test_a_held_empty_prompt_adds_the_gradient_of_its_distance(setup):
    whole, _ = gradient_of(setup)
    variants.empty(3.0)
    held, said = gradient_of(setup)
    model, state = measure.adapted(setup)
    moved, own = (embed(of, "")[1] for of in (model, setup.bundle))
    distance = 3 * (moved - own).square().sum() / own.square().sum()
    pull = torch.cat([g.flatten() for g in torch.autograd.grad(distance, list(state.adapter.parameters()))])
    torch.testing.assert_close(held - whole, pull.double(), rtol=1e-4, atol=1e-5 * float(pull.abs().max()))
    assert said["empty"] == pytest.approx(float(distance.detach()), rel=1e-5)


def test_in_a_leaning_world_another_prompt_is_in_the_place_of_the_empty_one(setup):
    text = variants.LEANING[0]
    model, _ = measure.adapted(setup)
    world = variants.leaning_world(setup.bundle, 0, model)
    c, c_empty = embed(world, "a cook")
    torch.testing.assert_close(c_empty, embed(model, text)[0])
    torch.testing.assert_close(c, embed(model, "a cook")[0])
    variants.leaning(0)
    trained, _ = loop.new_state(setup)
    assert not torch.equal(embed(trained, "")[1], embed(setup.bundle, "")[1])
    torch.testing.assert_close(embed(trained, "")[1], embed(setup.bundle, text)[0])  # at its start


def test_soft_tokens_keep_a_length_and_start_as_words(loaded_tiny):
    variants.words(0)
    tokens = lora.first_tokens(loaded_tiny, 3)
    ids = loaded_tiny.tokenizer([" ".join(variants.STARTS[0].split()[:3])])[0, 1:4]
    torch.testing.assert_close(tokens, loaded_tiny.text_encoder.embed(ids).float())
    setup = measure.setup_of(loaded_tiny, component="prefix", tokens=3)
    variants.length(2.5)
    _, state = loop.new_state(setup)
    loop.update(setup.recipe, state, [torch.ones_like(p) for p in state.parameters().values()])
    torch.testing.assert_close(state.adapter.prefix.norm(dim=1), torch.full((3,), 2.5))


def test_lines_of_log_odds_over_scales_are_free_of_noise():
    rng, scales, n = np.random.default_rng(0), [1.0, 2.5, 5.0, 7.5, 12.0], 400
    level, slopes = rng.normal(0, 0.5, 40), rng.normal(0.1, 0.05, 40)
    shares = expit(level + slopes * np.array(scales)[:, None])
    k = rng.binomial(n, shares)
    found = guidance_drift.lines(scales, np.stack([k, n - k], -1))
    assert found["slope"] == pytest.approx(slopes.mean(), abs=0.005)
    assert found["sd"] == pytest.approx(slopes.std(ddof=1), abs=0.01)
    again = np.random.default_rng(1).binomial(n, shares, (200, *shares.shape))
    drawn = [guidance_drift.lines(scales, np.stack([k, n - k], -1))["slope"] for k in again]
    assert found["error"] == pytest.approx(np.std(drawn), rel=0.2)
    assert found["misfit"] == pytest.approx(1, abs=0.3) and found["bend"] < 4
    bent = rng.binomial(n, expit(level + 0.05 * (np.array(scales)[:, None] - 6) ** 2))
    assert guidance_drift.lines(scales, np.stack([bent, n - bent], -1))["misfit"] > 3
    # a bend that no occupation shows alone, but all together
    slight = rng.binomial(n, expit(level + 0.004 * (np.array(scales)[:, None] - 6) ** 2))
    found = guidance_drift.lines(scales, np.stack([slight, n - slight], -1))
    assert found["misfit"] < 2 and found["bend"] > 10


def test_the_ways_of_the_drift_move_what_they_say(setup, tmp_path):
    model, state = measure.adapted(setup)
    info = {"base": setup.bundle.fingerprints}
    save_adapter(tmp_path / FILE, state.parameters(), info)
    ways = guidance_drift.ways(setup.bundle, tmp_path)
    moved, own = embed(model, "a cook"), embed(setup.bundle, "a cook")
    for way, wanted in {
        "both": moved,
        "c alone": [moved[0], own[1]],
        "c_empty alone": [own[0], moved[1]],
    }.items():
        torch.testing.assert_close(embed(ways[way], "a cook"), torch.stack(list(wanted)))
    assert len({ways[way].adapters for way in ways}) == len(ways)  # what is kept of one is no other's


@pytest.mark.parametrize("rho", [0.0, -0.5])
def test_the_correlation_of_pairs(rho):
    rng, found = np.random.default_rng(1), []
    for share in SHARES:
        z = rng.multivariate_normal([0, 0], [[1, rho], [rho, 1]], 30)
        found.append((z < norm.ppf(share)).astype(float))
    deviations = [of - share for of, share in zip(found, SHARES, strict=True)]
    seen = sum(of.prod(1).sum() for of in deviations) / sum((of**2).sum() / 2 for of in deviations)
    value, error = antithetic.correlation(found)
    assert value == pytest.approx(seen, abs=0.01) and 0.005 < error < 0.03


def test_a_shift_is_nothing_to_an_encoder_without_positions(setup):
    bundle = setup.bundle
    positions = bundle.text_encoder.text_model.embeddings.position_embedding
    ids = bundle.tokenizer(["a cook"])[0]
    plain = embed(bundle, "a cook")[:1]
    shifted = prefix_limits.Shift()(bundle, ids, plain)
    assert not torch.allclose(shifted, plain)
    kept = positions.weight.clone()
    try:
        positions.weight.zero_()
        torch.testing.assert_close(prefix_limits.Shift()(bundle, ids, plain), embed(bundle, "a cook")[:1])
    finally:
        positions.weight.copy_(kept)


def test_a_fit_finds_the_tokens_that_made_its_target(setup, monkeypatch):
    bundle, prompts = setup.bundle, ["a cook", "a nurse", "a pilot of planes"]
    monkeypatch.setattr(prefix_limits, "P", 1)
    made = prefix_limits.with_tokens(
        bundle, lora.first_tokens(bundle, 1, torch.Generator().manual_seed(5)), "x"
    )

    def wanted(of, prompt):
        c = prefix_limits.embed_of(of, prompt)
        return (
            c if of is not made else torch.cat([c[:, :1], c[:, 2:], c[:, -1:]], 1)
        )  # where the plain prompt has them

    monkeypatch.setattr(prefix_limits, "embed_of", prefix_limits.embed, raising=False)
    monkeypatch.setattr(prefix_limits, "embed", wanted)
    start = lora.first_tokens(bundle, 1, torch.Generator().manual_seed(6))
    loss = prefix_limits.fit_of_c(bundle, made, prompts)
    assert float(loss(made.soft.prefix, 0)) < 1e-9 < float(loss(start, 0))


def test_the_table_of_a_screen_has_a_row_for_each_strength():
    name = "3 drawn"
    row = {key: 0.5 for key in screen.COLUMNS[2:]} | {"bias": [0.2, 0.3]}
    found = {
        f"{name}-100-0": row,
        f"{name}-100-1": row | {"bias": [0.4, 0.5]},
        f"{name} x 1.2 at 12-100-0": row,
    }
    text = screen.tables({**found, f"{name}-50-0": row, "original": row}, 100)
    assert text.count("\n| 3 drawn") == 2
    assert "| 3 drawn | 2 | 0.300 / 0.400 |" in text and "| 3 drawn x 1.2 at 12 | 1 | 0.200 / 0.300 |" in text


def test_an_inner_part_of_an_iteration_takes_its_time_from_the_outer_one():
    times = iter([0.0, 1.0, 3.0, 10.0, 20.0, 20.5, 21.0, 24.0])
    clock = iteration.Clock(lambda: next(times))
    inner = clock.watch(lambda: None, "decoder")
    clock.watch(inner, "judges")()  # from 0 to 10, of which 1 to 3 is the decoder's
    clock.watch(inner, "adapted path")()  # from 20 to 24, all of it the path's
    spent = {part: seconds for part, seconds in clock.seconds.items() if seconds}
    assert spent == {"judges": 8.0, "decoder": 2.0, "adapted path": 4.0} and not clock.open


def test_unseen_bias_by_minutes(tmp_path, loaded_tiny, monkeypatch):
    """A checkpoint's moving average is what is judged; a curve has the points that all seeds have."""
    train(
        loaded_tiny, out=tmp_path / "run", iterations=2, checkpoint_every=1, keep=9, evaluate="none", lr=0.1
    )
    monkeypatch.setattr(time_to_bias, "load_adapter", lambda bundle, file: seen.append(read(file)) or bundle)
    seen, checkpoints = [], time_to_bias.saved(tmp_path / "run")
    for checkpoint in checkpoints:
        found = time_to_bias.look(loaded_tiny, tmp_path / "run", checkpoint, 2)
        assert len(found["bias"]) == 1 and 0 <= found["bias"][0] <= 1
        assert found["clip_i"] == pytest.approx(1, abs=1e-6)  # the stand-in of the adapter changes nothing
    last = read(tmp_path / "run" / FILE)
    assert len(checkpoints) == 2 and all(torch.equal(seen[1][name], last[name]) for name in last)
    assert any(not torch.equal(seen[0][name], last[name]) for name in last)
    bias = {
        "3": {"25": [0.4, 0.5], "50": [0.2, 0.3]},
        "4": {"25": [0.6, 0.5], "50": [0.3, 0.2], "75": [0, 0]},
    }
    looks = {s: {n: {"bias": v, "clip_i": 0.9} for n, v in of.items()} for s, of in bias.items()}
    report = {"ways": {"now": {"options": "--clip 1", "looks": looks, "seconds": 6.0}}}
    rows = time_to_bias.figure(report).rows
    assert [(row["minutes"], row["mean"], row["low"], row["high"]) for row in rows] == [
        (2.5, 0.5, 0.4, 0.6),
        (5.0, 0.25, 0.2, 0.3),
    ]
    assert "| .20 / .30, .00 / .00 | .90, .90 | `--clip 1` |" in time_to_bias.lines_of(report)


def test_a_name_is_of_one_screen_or_of_one_group():
    """--only takes both."""
    rows = [name for group in screen.GROUPS.values() for name in group]
    assert len(set(rows)) == len(rows) and set(rows).isdisjoint(screen.GROUPS)


def test_the_committed_screens_are_what_their_names_mean():
    rows = {name: words for group in screen.GROUPS.values() for name, words in group.items()}
    for key, row in read_json(measure.ROOT / "docs" / "results" / "screens.json").items():
        if not key.startswith(screen.ORIGINAL):
            name = re.split(" x | at |, unseen", key.rpartition("-")[0].rpartition("-")[0])[0]
            assert row["command"].strip() == rows[name], key
