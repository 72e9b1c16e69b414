"""Random numbers: every draw of a run has a stream of its own, and each is drawn anew in every iteration."""

import itertools
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundle import write_tiny_bundle
from tiny_run import make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.diffusion.sampler import noise
from fairref.evaluation import judging
from fairref.fairness.transport import joint_ot
from fairref.prompts import CONCEPTS, PARTS, concept, occupation_prompt, read_occupations
from fairref.training import step, validation
from fairref.training.step import draw_task, iteration_gradient, prompt_of

EMOJI = Path(__file__).parents[2] / "weights" / "emoji"
N, S = 2, 2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return load_bundle(write_tiny_bundle(tmp_path_factory.mktemp("bundle")))


def gradient(setup, i):
    model, state = moved(setup)
    return iteration_gradient(setup, model, list(state.adapter.parameters()), i)


@pytest.fixture
def keys(monkeypatch):
    """Kind of generator and key, filled with zeros as numpy does, of every generator that is made."""
    made, of_numpy, of_noise = [], np.random.default_rng, np.random.SeedSequence

    def full(kind, key):
        key = (key,) if isinstance(key, int) else key
        made.append((kind, *key, *[0] * (4 - len(key))))
        return key

    monkeypatch.setattr(np.random, "default_rng", lambda key: of_numpy(full("streams", key)))
    monkeypatch.setattr(np.random, "SeedSequence", lambda key: of_noise(full("noise", key)))
    return made


def test_no_two_draws_of_a_run_have_the_same_key(bundle, keys):
    """Counted by hand: 4 neutral prompts and 2 that name a class, in 24 iterations of which every third names one."""
    setup = make_setup(bundle, batch=N, steps=f"{S}:{S + 1}", explicit_every=3, grad_steps=1)
    explicit = (("a woman", "gender", 0), ("a man", "gender", 1))
    setup = replace(setup, explicit=explicit)
    for i in range(24):
        draw_task(setup, i)
    for i in range(3):
        gradient(setup, i)
    of = {kind: [key[1:] for key in keys if key[0] == kind] for kind in ("streams", "noise")}
    # S and guidance of 24 iterations, 16 / 4 and 8 / 2 epochs; where the run stops, the gradient's steps and the
    # transport of 3
    assert len(set(of["streams"])) == 2 * 24 + 4 + 4 + 3 * 3
    assert len(set(of["noise"])) == len(of["noise"]) == N * 3
    # and the seed of a run is the first number in all of them
    keys.clear()
    gradient(replace(setup, recipe=replace(setup.recipe, seed=1)), 0)
    assert not {key[1:] for key in keys} & {*of["streams"], *of["noise"]}
    assert {key[1] for key in keys} == {1} and all(key[4] == 0 for key in keys)


def test_streams_have_numbers_of_their_own_above_zero():
    """0 would be where numpy's filling with zeros starts: (seed, 0, 0) is the key (seed,)."""
    names = ("ORDER", "STEPS", "GRAD_STEPS", "EXPLICIT", "GUIDANCE", "TRANSPORT", "STOP")
    numbers = [getattr(step, name) for name in names]
    assert len(set(numbers)) == len(names) and min(numbers) > 0
    first = {
        int(np.random.SeedSequence((seed, stream, i)).generate_state(1, np.uint64)[0])
        for seed, stream, i in itertools.product((0, 1, 2**32 - 1), numbers, (0, 1, 2, 2**32 - 1))
    }
    assert len(first) == 3 * len(numbers) * 4


def test_equal_keys_of_noise_and_of_streams_give_unlike_numbers():
    """Both have keys of three numbers, so (seed, 2, 5) may be the noise of an image and the S of an iteration."""
    for key in itertools.product((0, 7), (1, 2, 6), (0, 1)):
        seed, number, n = key
        image = noise(seed, number, [n], (4096,))[0].double()
        stream = torch.from_numpy(step.draws(*key).standard_normal(4096, dtype=np.float32)).double()
        assert abs(float(torch.corrcoef(torch.stack([image, stream]))[0, 1])) < 6 / 4096**0.5


def test_prompts_that_name_a_class_come_in_an_order_of_their_own():
    """Of 8 prompts; two orders would be equal by chance once in 40,320 times."""
    for seed, epoch in itertools.product(range(3), range(3)):
        places = range(8 * epoch, 8 * epoch + 8)
        neutral = [prompt_of(seed, i, 8) for i in places]
        explicit = [prompt_of(seed, i, 8, stream=step.EXPLICIT) for i in places]
        assert sorted(neutral) == sorted(explicit) == list(range(8)) and neutral != explicit


@pytest.mark.parametrize("what", ["S", "guidance", "steps of the gradient", "noise", "transport"])
def test_what_an_iteration_draws_follows_from_the_seed_and_the_iteration(bundle, monkeypatch, what):
    """Alike in two runs of one seed, unlike in two iterations and two seeds."""
    drawn = []
    if what == "steps of the gradient":
        real = step.subsample
        monkeypatch.setattr(step, "subsample", lambda w, M, u, size: drawn.append(u) or real(w, M, u, size))
    if what == "noise":
        real = step.first_noise
        monkeypatch.setattr(
            step, "first_noise", lambda *args: drawn.append(float((z := real(*args)).sum())) or z
        )
    if what == "transport":
        real = step.joint_ot

        def once(*args, rng):
            drawn.append(float(rng.random()))
            return real(*args, rng=rng)

        monkeypatch.setattr(step, "joint_ot", once)
    setup = make_setup(bundle, batch=N, steps="2:1000", guidance="1:12", grad_steps=1)
    short = replace(setup, recipe=replace(setup.recipe, steps="2:2"))
    for seed, i in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]:
        if what in ("S", "guidance"):
            task = draw_task(replace(setup, recipe=replace(setup.recipe, seed=seed)), i)
            drawn.append(getattr(task, what))
        else:
            gradient(replace(short, recipe=replace(short.recipe, seed=seed)), i)
    assert drawn[0] == drawn[-1] and len(set(drawn)) == 4


def test_two_scales_take_turns_within_each_pair_of_iterations(bundle):
    """In an order that is drawn: else the first of two prompts that stay together would always have the same."""
    setup = make_setup(bundle, guidance="1,7.5", steps="3:4")
    scales = np.array([draw_task(setup, i).guidance for i in range(200)]).reshape(-1, 2)
    assert (np.sort(scales, 1) == [1, 7.5]).all() and 30 < (scales[:, 0] == 1).sum() < 70
    assert len({draw_task(setup, i).S for i in range(20)}) == 2
    falling = make_setup(bundle, guidance="7.5,1", steps="3:4")
    assert {draw_task(falling, i).guidance for i in range(20)} == {1, 7.5}


def test_the_error_of_drawn_targets_averages_out_over_iterations(bundle, monkeypatch):
    """The same logits in every iteration, K = 6 classes: the mean of 12 independent errors of q is 1/sqrt(12) = .29 as
    long as one of them, that of 12 equal errors is as long."""
    setup = make_setup(bundle, "gender,skin_tone", batch=6)
    generator, found = torch.Generator().manual_seed(0), []
    logits = {
        name: 2 * torch.randn(6, len(classes), generator=generator)
        for name, classes in setup.target.classes.items()
    }

    def keep(*args, **options):
        found.append(joint_ot(*args, exact_limit=0, tolerance=0.05, **options))
        raise StopIteration

    monkeypatch.setattr(step, "joint_ot", keep)
    monkeypatch.setattr(step, "all_logits", lambda *_: (logits, torch.ones(6, dtype=torch.bool)))
    monkeypatch.setattr(step, "rollout", lambda *_: [])
    monkeypatch.setattr(step, "draw_pair", lambda *_: None)
    for i in [*range(12), 0]:
        with pytest.raises(StopIteration):
            gradient(setup, i)
    exact = joint_ot(logits, setup.target.table)
    q = torch.stack([torch.cat([ot.q for ot in one.values()], 1) for one in found])
    assert torch.equal(q[0], q[-1])
    error = q[:-1] - torch.cat([ot.q for ot in exact.values()], 1)
    one = error.flatten(1).norm(dim=1)
    assert float(one.min()) > 0 and float(one.max()) < 0.3
    assert float(error.mean(0).norm() / one.mean()) < 0.5


def test_targets_that_are_not_drawn_take_no_random_numbers(bundle, monkeypatch):
    """Two classes in closed form; three, at this size, by all class counts."""

    class Nothing:
        def __getattr__(self, name):
            pytest.fail(f"drew {name}")

    for attribute in ("gender", "skin_tone"):
        setup = make_setup(bundle, attribute, batch=N, steps=S)
        model, state = moved(setup)
        parameters = list(state.adapter.parameters())
        wanted, _ = iteration_gradient(setup, model, parameters, 0)
        with monkeypatch.context() as patch:
            patch.setattr(step, "joint_ot", lambda *args, rng: joint_ot(*args, rng=Nothing()))
            found, _ = iteration_gradient(setup, model, parameters, 0)
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("threshold", ["reach", "leave"])
def test_the_threshold_is_on_the_likeliest_class_or_on_leaving(bundle, monkeypatch, threshold):
    setup = make_setup(bundle, "gender,skin_tone", batch=24, C=0.6, threshold=threshold)
    generator, has_face = torch.Generator().manual_seed(0), torch.arange(24) % 6 > 0
    logits = {n: 4 * torch.randn(24, len(k), generator=generator) for n, k in setup.target.classes.items()}
    logits["skin_tone"][:, 0] += 5
    monkeypatch.setattr(step, "all_logits", lambda *_: (logits, has_face))
    q, _ = step.transport_targets(setup, draw_task(setup, 0), None, 0)
    rng = step.draws(setup.recipe.seed, step.TRANSPORT, 0)
    plain = joint_ot(logits, setup.target.table, has_face, rng=rng)
    changed = 0
    for name, of_attribute in plain.items():
        others = of_attribute.q.clone()
        others[torch.arange(24), logits[name].argmax(1)] = 0
        leaves = (others.sum(1) >= 0.6) & has_face & (threshold == "leave")
        assert torch.equal(q[name][~leaves], of_attribute.q[~leaves])
        assert torch.equal(q[name][leaves].argmax(1), others[leaves].argmax(1))
        torch.testing.assert_close(q[name][leaves].amax(1), others[leaves].sum(1))
        assert not q[name][~has_face].any()
        changed += int(leaves.sum())
    assert changed > 2 or threshold == "reach"


def test_random_targets_are_drawn_anew_and_do_not_ask_the_images(bundle, monkeypatch):
    """Whole and confident where there is a face, none elsewhere; the transport is not asked."""
    setup = make_setup(bundle, "gender,skin_tone", batch=64, targets="random")
    has_face, logits = torch.arange(64) % 4 > 0, {}
    monkeypatch.setattr(step, "joint_ot", None)
    monkeypatch.setattr(step, "all_logits", lambda *_: (logits, has_face))

    def targets(i, seed):
        for name, classes in setup.target.classes.items():
            logits[name] = torch.full((64, len(classes)), float(seed))
        task = draw_task(setup, i)
        q, metrics = step.transport_targets(setup, task, None, i)
        assert "cost" not in metrics and {name: rows.dtype for name, rows in q.items()} == dict.fromkeys(
            setup.target.classes, torch.float64
        )
        return torch.cat(list(q.values()), 1)

    first, again, next_one = targets(0, 0), targets(0, 1), targets(1, 0)
    assert torch.equal(first, again) and not torch.equal(first, next_one)
    assert ((first == 0) | (first == 1)).all() and torch.equal(first.sum(1), 2.0 * has_face)
    assert set(map(tuple, first[has_face].nonzero()[:, 1].view(-1, 2).tolist())) == set(
        itertools.product((0, 1), (2, 3, 4))
    )


def test_the_noise_of_training_validation_and_evaluation_never_meets():
    """Keys are (seed, iteration, image) in training, (seed, crc32 of the prompt, image) elsewhere. Even a run with
    validation's own seed does not meet it before iteration 100,000, and no two prompts share their noise."""
    assert validation.SEED != judging.SEED and min(validation.SEED, judging.SEED) > 100_000
    prompts = {prompt for name in CONCEPTS for part in PARTS for prompt in getattr(concept(name), part)}
    own = read_occupations(EMOJI)
    prompts |= {occupation_prompt(name) for part in PARTS for name in getattr(own, part)}
    prompts |= {prompt for parts in own.concepts.values() for part in parts.values() for prompt in part}
    streams = {zlib.crc32(prompt.encode()) for prompt in prompts}
    assert len(streams) == len(prompts) > 1000 and min(streams) > 100_000
