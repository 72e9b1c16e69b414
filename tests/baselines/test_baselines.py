"""Each baseline is what its paper says, on the noise of evaluation."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import chisquare

from fairref.baselines import case as cases
from fairref.baselines import coin, fair_pca, projection, uce
from fairref.baselines.case import Case, class_states, states
from fairref.baselines.fitting import fit_baselines
from fairref.baselines.registry import BASELINES, parse_baselines
from fairref.bundle.loading import bundle_path
from fairref.errors import UserError
from fairref.evaluation.judging import EvaluationSettings
from fairref.fairness.attributes import parse_targets
from fairref.files.weights import read_info
from fairref.generation.drawing import Drawing, draw, fixed_images, fixed_noise
from fairref.processes import Processes
from fairref.prompts import occupation_prompt

PROMPT = occupation_prompt("singer")  # of the part test
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "baselines.safetensors")


def settings_of(bundle, target="gender"):
    return EvaluationSettings(bundle, parse_targets([target], bundle.attributes), Drawing(2, 2.0))


@pytest.fixture(scope="module")
def case(loaded_tiny):
    return Case(settings_of(loaded_tiny))


@pytest.fixture(scope="module")
def tones(loaded_tiny):
    return Case(settings_of(loaded_tiny, "skin_tone"))


def original(case, prompt, images):
    return fixed_images(case.bundle, case.settings.seed, prompt, images, case.settings.drawing)


def prepared(text, case, cache=None):
    (source,) = fit_baselines(parse_baselines([text]), case.settings, (), cache)
    return source.draw


# ---- coin


def test_coins_have_the_targets_shares(loaded_tiny):
    target = (0.2, 0.5, 0.3)
    uneven = Case(settings_of(loaded_tiny, "skin_tone=.2,.5,.3"))
    drawn = [coin.toss(uneven, prompt, i) for prompt in ("a", "b") for i in range(1000)]
    counts = np.bincount(drawn, minlength=3)
    assert chisquare(counts, 2000 * np.array(target)).pvalue > 0.01
    assert drawn[:1000] != drawn[1000:]  # each prompt has its own
    assert drawn[7] == coin.toss(uneven, "a", 7)


def test_a_coin_puts_the_word_in_and_keeps_the_noise(case):
    images = range(4, 11)  # the classes come mixed
    x = prepared("coin", case)(PROMPT, images)
    (noise,) = [z_T for _, z_T in fixed_noise(case.bundle, case.settings.seed, PROMPT, images)]
    drawn = [coin.toss(case, PROMPT, i) for i in images]
    assert drawn == [0, 0, 0, 1, 1, 0, 1]
    for row, k in enumerate(drawn):
        text = f"a photo of the face of a {['woman', 'man'][k]} singer, a person"
        alone = draw(case.bundle, (text, ""), noise[[row]], case.settings.drawing)[0]
        torch.testing.assert_close(x[row], alone, atol=1e-4, rtol=0)
    far = (x - original(case, PROMPT, images)).abs().amax((1, 2, 3))
    assert far.min() > 1e-3
    torch.testing.assert_close(prepared("coin", case)(PROMPT, range(6, 9)), x[2:5], atol=1e-4, rtol=0)


def test_a_coin_leaves_prompts_alone_that_name_a_class_and_refuses_what_it_does_not_know(case):
    for prompt in ("a photo of the face of a woman singer, a person", "an old man at sea"):
        assert torch.equal(prepared("coin", case)(prompt, range(2)), original(case, prompt, range(2)))
    with pytest.raises(UserError, match="'a person playing chess' is no prompt of an occupation"):
        prepared("coin", case)("a person playing chess", range(2))


def test_words_are_what_explicit_prompts_add(case, tones, loaded_tiny):
    assert case.words == ["woman", "man"] and tones.words == ["light", "medium", "dark"]
    classes = {"skin_tone": ("light", "medium-light", "medium", "dark")}
    emoji = replace(loaded_tiny, path=bundle_path("weights/emoji"), attributes=classes)
    assert Case(settings_of(emoji, "skin_tone")).words == [
        "light-skinned",
        "medium-light-skinned",
        "medium-skinned",
        "dark-skinned",
    ]


# ---- projection


def test_projection_is_the_published_one():
    P = projection.projection(GOLDEN["z"], 500)
    torch.testing.assert_close(P, GOLDEN["projection"])


def test_projection_minimises_its_objective_over_all_pairs(tones):
    """|P - I|^2 + lambda (mean of |P z_i - P z_j|^2), in loops and by autograd."""
    z = F.normalize(class_states(tones, 80), dim=2)
    assert z.shape == (3, 4, 32)  # K, X, d
    P, strength = projection.fit(tones, 30)["P"].requires_grad_(), 30
    pairs = [(i, j, x) for i, j in itertools.combinations(range(3), 2) for x in range(4)]
    close = sum((P @ z[i, x] - P @ z[j, x]).square().sum() for i, j, x in pairs) / len(pairs)
    loss = (P - torch.eye(32)).square().sum() + strength * close
    (slope,) = torch.autograd.grad(loss, P)
    assert slope.abs().max() < 1e-12
    far = sum((z[i, x] - z[j, x]).square().sum() for i, j, x in pairs) / len(pairs)
    assert close < 0.5 * far


def test_states_are_those_of_the_first_eos(case):
    prompts = ["a pilot", "a photo of a nurse"]
    for prompt, eos, word in zip(prompts, *(states(case, prompts, back) for back in (0, 1)), strict=True):
        ids = case.bundle.tokenizer([prompt])
        h, end = case.bundle.text_encoder(ids)[0], ids[0].tolist().index(case.bundle.tokenizer.eos)
        torch.testing.assert_close(eos.float(), h[end])
        torch.testing.assert_close(word.float(), h[end - 1])


@pytest.mark.parametrize("name", ["projection", "fair_pca"])
def test_the_empty_prompt_stays_and_every_token_of_the_other_is_edited(name, case, monkeypatch):
    seen = []

    def spy(bundle, c, c_empty, z_T, how):
        seen.append((c, c_empty, z_T))
        return torch.zeros(len(z_T), 3, 32, 32)

    monkeypatch.setattr(cases, "draw_embedded", spy)
    prepared(name, case)(PROMPT, range(2))
    ((c, c_empty, z_T),) = seen
    before, empty = case.bundle.text_encoder(case.bundle.tokenizer([PROMPT, ""]))
    assert torch.equal(c_empty[0], empty)
    assert ((c - before).norm(dim=2) > 1e-3).all()
    (noise,) = [z for _, z in fixed_noise(case.bundle, case.settings.seed, PROMPT, range(2))]
    assert torch.equal(z_T, noise)


def test_without_strength_a_projection_draws_the_original_bit_for_bit(case):
    for prompt in (PROMPT, "a person playing chess"):
        assert torch.equal(prepared("projection:0", case)(prompt, range(2)), original(case, prompt, range(2)))
    assert not torch.equal(prepared("projection", case)(PROMPT, range(2)), original(case, PROMPT, range(2)))


# ---- uce


def test_edited_weights_are_the_published_ones():
    alpha = GOLDEN["ratios"].sum(0)  # its rounds add up
    Q = uce.solve(GOLDEN["c"], GOLDEN["a"], alpha, 0.5)
    torch.testing.assert_close(GOLDEN["W"] @ Q.float(), GOLDEN["edited"], rtol=1e-4, atol=1e-5)


def test_edited_weights_minimise_their_objective(case):
    """As least squares: rows c_e -> W (c_e + sum_k alpha_ek a_k), and sqrt(lambda) I -> sqrt(lambda) W."""
    rng, strength = torch.Generator().manual_seed(0), 0.3
    c, a, alpha = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((5, 32), (2, 32), (5, 2)))
    edited = uce.edited(case.bundle, uce.solve(c, a, alpha, strength))
    before, after = (dict(bundle.unet.named_parameters()) for bundle in (case.bundle, edited))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [n for n in before if "attn2.to_k" in n or "attn2.to_v" in n] and changed
    for name in changed:
        W, root = before[name].double(), strength**0.5
        inputs = torch.cat([c, root * torch.eye(32, dtype=torch.float64)])
        wanted = torch.cat([(c + alpha @ a) @ W.T, root * W.T])
        best = torch.linalg.lstsq(inputs, wanted).solution.T
        torch.testing.assert_close(after[name].double(), best, rtol=1e-5, atol=1e-6)


def test_rounds_add_what_shares_lack_until_none_does(case, monkeypatch):
    """And an interrupted fit goes on as if it had not been."""
    told = torch.tensor([[0.9, 0.1], [0.52, 0.48], [0.2, 0.8], [torch.nan] * 2], dtype=torch.float64)
    rounds = []

    def shares(case, model, concepts, done):
        rounds.append((done, next(model.unet.parameters()).dtype))
        return torch.full_like(told, 0.5) if done == 3 else told

    monkeypatch.setattr(uce, "shares", shares)
    fits = list(uce.fit(case, 0.5, {}))
    assert [int(fit["rounds"]) for fit in fits] == [0, 1, 2, 3] and [done for done, _ in rounds] == [
        0,
        1,
        2,
        3,
    ]
    once = uce.STEP * torch.tensor([[-0.4, 0.4], [0, 0], [0.3, -0.3], [0, 0]], dtype=torch.float64)
    for i, fit in enumerate(fits):
        torch.testing.assert_close(fit["alpha"], i * once)
    ids = case.bundle.tokenizer(
        [*case.occupations.train, occupation_prompt("woman"), occupation_prompt("man")]
    )
    h, ends = case.bundle.text_encoder(ids), ids.tolist()
    words = [row.index(case.bundle.tokenizer.eos) - 1 for row in ends]  # the last before the first EOS
    word = h[range(len(ids)), words].double()
    torch.testing.assert_close(fits[1]["Q"], uce.solve(word[:-2], word[-2:], once, 0.5))
    *_, again = uce.fit(case, 0.5, fits[1])
    assert all(torch.equal(again[name], fits[-1][name]) for name in again)


def test_shares_are_counted_in_new_images_by_the_classifier_for_finetuning(case, monkeypatch):
    monkeypatch.setattr(uce, "IMAGES", 5)
    concepts = list(case.occupations.train[:2])
    found = uce.shares(case, case.bundle, concepts, 3)
    for row, prompt in zip(found, concepts, strict=True):
        x = fixed_images(case.bundle, case.settings.seed + 4, prompt, range(5), case.settings.drawing)
        women = (case.bundle.classifiers["finetune"][0](x)["gender"].argmax(1) == 0).float().mean()
        assert row.tolist() == pytest.approx([float(women), 1 - float(women)])


# ---- fair PCA


@pytest.mark.parametrize("K", [2, 3])
def test_fair_pca_is_the_published_one(K):
    x = GOLDEN[f"fair{K}/x"]
    U = fair_pca.fair_directions(x, 5)
    torch.testing.assert_close(U @ U.T, GOLDEN[f"fair{K}/projector"])
    published = GOLDEN[f"fair{K}/directions"]
    assert torch.allclose(fair_pca.class_directions(x)[-len(published) :], published)


@pytest.mark.parametrize("K", [2, 4])
def test_fair_directions_hold_no_class_and_the_most_of_the_rest(K):
    x = torch.from_numpy(np.random.default_rng(K).normal(size=(K, 6, 10)))
    x += 3 * x[:, :1]
    U = fair_pca.fair_directions(x, 4)
    torch.testing.assert_close(U.T @ U, torch.eye(4).double())
    means = (x @ U).mean(1)  # (K, D)
    torch.testing.assert_close(means, means[:1].expand(K, 4))
    # the constraint as an endless cost: the largest eigenvalues of X^T X - 1e9 B^T B
    X = x.flatten(0, 1)
    B = torch.stack([of_class.mean(0) - X.mean(0) for of_class in x])
    best = scipy.linalg.eigvalsh((X.T @ X - 1e9 * B.T @ B).numpy())[-4:].sum()
    assert float((X @ U).square().sum()) == pytest.approx(best, rel=1e-6)


def test_directions_that_no_prompt_has_are_lost():
    x = torch.from_numpy(
        np.random.default_rng(0).normal(size=(2, 3, 10))
    )  # 6 states, one direction of classes
    U = fair_pca.fair_directions(x, 9)
    assert U.shape == (10, 5)
    X = x.flatten(0, 1)
    v = fair_pca.class_directions(x)[0]
    torch.testing.assert_close(X @ U @ U.T, X - (X @ v)[:, None] * v)


def test_each_image_gets_the_noise_of_a_drawn_class(tones):
    fitted = fair_pca.fit(tones, 0.5)
    x = class_states(tones, 80)
    for k, j in ((0, 1), (2, 3)):
        v = F.normalize(x[k].mean(0) - x.mean((0, 1)), dim=0)
        torch.testing.assert_close(fitted["noise"][k, j], 0.5 * (v @ x[k, j]) * v)
    drawn = [fair_pca.drawn_member(tones, PROMPT, i, 4) for i in range(300)]
    assert chisquare(np.bincount([k for k, _ in drawn])).pvalue > 0.01
    assert {j for _, j in drawn} == set(range(4))
    a, b = (
        fair_pca.images_of(tones, fitted, PROMPT, range(2)),
        fair_pca.images_of(tones, fitted, PROMPT, range(1, 2)),
    )
    torch.testing.assert_close(a[1:], b, atol=1e-4, rtol=0)


# ---- what --baseline takes


@pytest.fixture
def short(monkeypatch):
    """A fit of uce takes a round of two images."""
    monkeypatch.setattr(uce, "IMAGES", 2)
    monkeypatch.setattr(uce, "ROUNDS", 1)


@pytest.mark.parametrize("name", BASELINES)
def test_a_fit_is_kept_and_a_damaged_one_is_named(name, case, tmp_path, short, caplog):
    x = prepared(name, case, tmp_path)(PROMPT, range(2))
    assert x.shape == (2, 3, 32, 32) and x.dtype == torch.float32 and x.abs().max() <= 1
    files = list(tmp_path.iterdir())
    assert len(files) == (name != "coin")
    for file in files:
        with pytest.MonkeyPatch.context() as patch:  # what was fitted is not fitted again
            patch.setitem(BASELINES, name, replace(BASELINES[name], fit=None))
            assert torch.equal(prepared(name, case, tmp_path)(PROMPT, range(2)), x)
        assert read_info(file)["whole"] is True
        with pytest.MonkeyPatch.context() as patch:  # as if another process lacked the file
            patch.setattr(Processes, "least", lambda _, numbers: [0] * len(numbers))
            patch.setitem(BASELINES, name, replace(BASELINES[name], fit=lambda *_: 1 / 0))
            with pytest.raises(ZeroDivisionError):
                prepared(name, case, tmp_path)
        file.write_bytes(b"broken")
    assert torch.equal(prepared(name, case, tmp_path)(PROMPT, range(2)), x)
    assert [(f.name in m, m[-21:]) for f, m in zip(files, caplog.messages, strict=True)] == [
        (True, ": it is fitted again.")
    ] * len(files)
    prepared(name, Case(replace(case.settings, seed=1)), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(files)
    prepared("projection:500.0001", case, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 * len(files) + 1


def test_a_fit_is_kept_by_all_that_it_follows_from(loaded_tiny, tmp_path):
    def key(text="projection:0.36", target="gender", **changed):
        settings = settings_of(replace(loaded_tiny, **changed), target)
        (source,) = fit_baselines(parse_baselines([text]), settings)
        return json.dumps(source.made_of)

    judges = loaded_tiny.classifiers
    own = SimpleNamespace(to_dict=lambda: {"path": str(tmp_path), "sha256": "other"})
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "prompts.json").write_text(
        (loaded_tiny.path / "prompts.json").read_text().replace("pilot", "diver")
    )
    keys = [
        key(),
        key("projection:0.37"),
        key("fair_pca"),
        key(target="gender=.3,.7"),
        key(target="skin_tone"),
        key(classifiers={**judges, "finetune": judges["evaluate"]}),
        key(own_judges={"finetune": [own]}),
        key(path=bundle),
    ]
    assert len({key(), *keys}) == len(keys) and str(tmp_path) not in "".join(keys)


def test_ones_own_baseline_is_a_function_of_a_file(case, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from fairref.baselines.case import draw_edited\n"
        "def twice(case, prompt, images):\n    return draw_edited(case, prompt, images, lambda c, _: 2 * c)\n"
        "def few(case, prompt, images):\n    return twice(case, prompt, images)[:1]\n"
        "def wrong(case, prompt, images):\n    return case.nothing\n"
        "def gone(case, prompt, images):\n    raise SystemExit\n"
        "def bright(case, prompt, images):\n    return 2 + 0 * twice(case, prompt, images)\n"
        "def broken(case, prompt, images):\n    return float('nan') * twice(case, prompt, images)\n"
    )
    x = prepared(f"{file}:twice", case)(PROMPT, range(2))
    assert x.shape == (2, 3, 32, 32) and not torch.equal(x, original(case, PROMPT, range(2)))
    for name, message in (
        ("few", r"gives a tensor \(1, 3, 32, 32\) of float32 for 2 images"),
        ("wrong", r"ends with .*nothing.*correct the file"),
        ("gone", r"ends with SystemExit.*correct the file"),
        ("bright", r"gives values from 2 to 2 for .*expected numbers in \[-1, 1\]: correct the file"),
        ("broken", r"gives values from nan to nan"),
    ):
        with pytest.raises(UserError, match=f"{name}: {message}"):
            prepared(f"{file}:{name}", case)(PROMPT, range(2))


@pytest.mark.parametrize(
    "texts, message",
    [
        (["dice"], "--baseline is 'dice'; expected one of coin, projection, uce, fair_pca, or path"),
        (["coin:1"], "coin has no number"),
        (["uce:-1"], "expected uce:NUMBER, its lambda, above 0"),
        (
            ["uce:0"],
            "expected uce:NUMBER, its lambda, above 0",
        ),  # its least squares have no one solution there
        (["uce:many"], "expected uce:NUMBER"),
        (["projection:nan"], "expected projection:NUMBER"),
        (["projection", "projection:500"], "names projection twice"),
    ],
)
def test_what_baseline_refuses(texts, message):
    with pytest.raises(UserError, match=message):
        parse_baselines(texts)


def test_names_and_numbers():
    chosen = parse_baselines(["projection:20", "projection", "uce"])
    assert [(one.name, one.number) for one in chosen] == [
        ("projection:20", 20),
        ("projection", 500),
        ("uce", 0.5),
    ]


def test_several_attributes_are_refused(loaded_tiny):
    target = parse_targets(["gender", "skin_tone"], loaded_tiny.attributes)
    with pytest.raises(UserError, match="--attr names gender, skin_tone; give one"):
        Case(EvaluationSettings(loaded_tiny, target, Drawing(2, 2.0)))


def test_uce_needs_a_classifier_for_finetuning(loaded_tiny):
    (evaluate,) = loaded_tiny.classifiers["evaluate"]
    bundle = replace(loaded_tiny, classifiers={"evaluate": (evaluate,)})
    with pytest.MonkeyPatch.context() as patch:  # refused before any is fitted
        patch.setattr(projection, "fit", None)
        with pytest.raises(UserError, match="has no classifier for finetuning"):
            fit_baselines(parse_baselines(["projection", "uce"]), settings_of(bundle))
