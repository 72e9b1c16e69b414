"""The loss of an iteration with faces and DINO is docs/method.md §5 case by case, and its gradient Algorithm A.1's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from tiny_bundle import FACE_SIDE, RESOLUTION, write_tiny_bundle
from tiny_run import images_by_hand, make_setup, moved

from fairref.bundle.loading import load_bundle
from fairref.bundle.recipe import resolve
from fairref.diffusion.sampler import noise
from fairref.diffusion.solver import solver_table
from fairref.errors import UserError
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import (
    TEMPLATE,
    DetectedFaces,
    Faces,
    align_crops,
    crops,
    square_around,
)
from fairref.files.own_code import OwnFunction
from fairref.generation.rollout import embed, guided, rollout
from fairref.training import terms
from fairref.training.checks import lacking, require_parts
from fairref.training.own_losses import OwnLoss
from fairref.training.setup import Setup, Task
from fairref.training.step import Rollout, draw_pair, draw_task, iteration_gradient

LIMIT = 0.6  # of "sure", so that some originals are and some are not


def detector(x):
    """Finds a face in about three of four pictures, somewhere that depends on all of its pixels."""
    found = []
    for total in x.long().sum((1, 2, 3)).tolist():
        if total % 4 == 0:
            found.append(DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2)))
            continue
        left, top, side = total % 7 - 2, total // 7 % 13, 12 + total // 91 % 9
        box = torch.tensor([left, top, left + side - 3, top + side], dtype=torch.float32)
        landmarks = torch.tensor(TEMPLATE) / 112 * side + torch.tensor([left, top])
        found.append(DetectedFaces(box[None], landmarks[None]))
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_tiny_bundle(tmp_path_factory.mktemp("faces"), faces=True)
    bundle = load_bundle(folder, dtype=torch.float64)
    assert bundle.detector is not None and bundle.dino is not None and len(bundle.face_features) == 9
    return replace(bundle, detector=detector)


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(terms, "MIN_ORIGINAL_CONFIDENCE", LIMIT)


def with_faces(bundle, attribute="gender", **recipe):
    return make_setup(bundle, attribute, **{"batch": 7, "steps": 3, "guidance": 3.0, "C": 0.85, **recipe})


def adapted(setup):
    """An adapted bundle away from its start, and its parameters."""
    model, state = moved(setup)
    return model, list(state.adapter.parameters())


def face_of(image):
    """The one face of a picture (3, H, W), as Faces of a batch of one; None where there is none."""
    (found,) = detector(((image.detach() + 1) * 127.5).round().to(torch.uint8)[None])
    if not len(found.boxes):
        return None
    return Faces(torch.tensor([True]), square_around(found.boxes.double()), found.landmarks.double())


def embedding(bundle, image, face):
    cut = align_crops(image[None], face, FACE_SIDE)
    return F.normalize(bundle.embedder(cut) + bundle.embedder(cut.flip(3)), dim=1)[0]


def literal_loss(setup, x, o):
    """docs/method.md §3-5, image by image -> loss, and the cases that occurred."""
    bundle, r, N = setup.bundle, setup.recipe, setup.recipe.batch
    (h,), D_F = bundle.classifiers["finetune"], F.normalize(bundle.face_features.double(), dim=1)
    faces, o_faces = [face_of(image) for image in x], [face_of(image) for image in o]
    logits = {
        n: h(crops(x[n : n + 1], faces[n], RESOLUTION))["gender"][0] for n in range(N) if faces[n] is not None
    }
    order = sorted(logits, key=lambda n: -(logits[n][0] - logits[n][1]).item())
    loss, cases = 0, set()
    for n in range(N):
        fx, fo = faces[n], o_faces[n]
        sure = same = own = False
        p_o = h(crops(o[n : n + 1], fo, RESOLUTION))["gender"][0].softmax(0) if fo is not None else None
        if fx is not None:
            q_0 = binom.sf(order.index(n), len(order), 0.5)
            sure, y = max(q_0, 1 - q_0) >= r.C, int(q_0 < 0.5)
            same = bool(sure and fo is not None and int(p_o.argmax()) == y)
        if sure:
            loss = loss - F.log_softmax(logits[n], 0)[y] / N
            e = embedding(bundle, x[n], fx)
            own = bool(same and p_o.max() >= LIMIT and r.face_reference == "original")
            reference = embedding(bundle, o[n], fo) if own else D_F[(D_F @ e).argmax()]
            loss = loss + r.lambda_face * (1 - e @ reference.detach()) / N
        image, weight = x[n].clone(), r.lambda_img
        if fx is not None and not same:
            weight *= r.lambda_2["gender"]
            if fo is not None:
                left, top = torch.maximum(fx.boxes[0, :2], fo.boxes[0, :2]).tolist()
                right, bottom = torch.minimum(fx.boxes[0, 2:], fo.boxes[0, 2:]).tolist()
                inside = torch.ones(RESOLUTION, RESOLUTION, dtype=torch.float64)
                for row in range(RESOLUTION):
                    for column in range(RESOLUTION):
                        if left <= column + 0.5 < right and top <= row + 0.5 < bottom:
                            inside[row, column] = r.lambda_3["gender"]
                image.register_hook(lambda grad, inside=inside: grad * inside)
        clip = bundle.clip.encode_image(image[None])[0] @ bundle.clip.encode_image(o[n : n + 1])[0]
        dino = F.cosine_similarity(bundle.dino(image[None]), bundle.dino(o[n : n + 1]))[0]
        loss = loss + weight * (2 - clip - dino) / N
        cases.add((fx is not None, fo is not None, sure, same, own))
    return loss, cases


@pytest.mark.parametrize("reference", ["original", "nearest"])
def test_an_iteration_with_faces_is_the_method_case_by_case(bundle, reference):
    setup = with_faces(
        bundle, lambda_img=40.0, lambda_2=0.3, lambda_3=0.5, lambda_face=3.0, face_reference=reference
    )
    r = setup.recipe  # one number read in another's place must show
    shares = (r.lambda_2["gender"], r.lambda_3["gender"])
    assert len({r.lambda_img, *shares, r.lambda_face, r.C, LIMIT, 1.0}) == 7
    model, parameters = adapted(setup)
    seen = set()
    for i in range(5):
        gradient, metrics = iteration_gradient(setup, model, parameters, i)
        x, o = images_by_hand(setup, model, i)
        loss, cases = literal_loss(setup, x, o)
        seen |= cases
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-11)
        for found, wanted in zip(gradient, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8 * float(wanted.abs().max()))
    own = reference == "original"
    assert seen >= {  # face, original's face, confident, agreeing, own reference
        (False, True, False, False, False),
        (True, False, True, False, False),
        (True, True, False, False, False),
        (True, True, True, False, False),
        (True, True, True, True, False),
        *([(True, True, True, True, True)] if own else []),
    }


def test_each_attribute_has_its_own_weights_in_and_outside_the_face(bundle, monkeypatch):
    """The gradient of L_img alone, 1 in each pixel, is the picture of the weights: docs/method.md §5's table."""
    target = parse_targets(["gender", "skin_tone"], bundle.attributes)
    shares = {"lambda_2": {"gender": 0.5, "skin_tone": 0.3}, "lambda_3": {"gender": 0.2, "skin_tone": 0.7}}
    recipe = {"batch": 6, "C": 0.8, "lambda_img": 10.0, "lambda_face": 0.0, **shares}
    setup = Setup(bundle, resolve(tuple(target.classes), bundle.recipe, recipe), target, (("a cook",),))
    monkeypatch.setattr(terms.losses, "image_loss", lambda x, o, features, N: x.sum((1, 2, 3)) / N)

    def classify(self, x, faces):
        count = int(faces.has_face.sum())
        return {name: x.new_zeros(count, len(classes)) for name, classes in target.classes.items()}

    monkeypatch.setattr(Setup, "classify", classify)
    box = [4.0, 6.0, 20.0, 22.0]

    def faces(*found):
        count = sum(found)
        return Faces(torch.tensor(found), torch.tensor([box] * count), torch.zeros(count, 5, 2))

    both, no_face, no_original = (True, True), (False, True), (True, False)
    # shows a face, its original does; the target is confident and the original's class in gender, in skin tone; the
    # weight of L_img outside the box, and in it
    cases = [
        (both, True, True, 10.0, 10.0),
        (both, False, True, 5.0, 1.0),
        (both, True, False, 3.0, 3.0 * 0.7),
        (both, False, False, 3.0, 3.0 * 0.2),
        (no_face, False, False, 10.0, 10.0),
        (no_original, True, True, 3.0, 3.0),
    ]
    x = torch.zeros(6, 3, RESOLUTION, RESOLUTION, dtype=torch.float64, requires_grad=True)
    shown = [faces(*(case[0][which] for case in cases)) for which in (0, 1)]
    o_class = torch.zeros(6, 2, dtype=torch.long)
    unsure = torch.zeros(6, dtype=torch.bool)
    pair = terms.ImagePair(x, x, x.detach(), *shown, o_class, unsure)
    q = {name: torch.zeros(6, len(classes), dtype=torch.float64) for name, classes in target.classes.items()}
    for n, (_, *agrees, _, _) in enumerate(cases):
        for rows, agree in zip(q.values(), agrees, strict=True):
            rows[n, 0 if agree else 1] = 1
    loss, _ = terms.loss_of(terms.View(setup, Task("a cook", target, False, 2, 2.0), x, pair, q))
    (g,) = torch.autograd.grad(loss, x)
    for n, (*_, outside, inside) in enumerate(cases):
        wanted = torch.full((3, RESOLUTION, RESOLUTION), outside, dtype=torch.float64)
        wanted[:, 6:22, 4:20] = inside
        torch.testing.assert_close(g[n], wanted / 6, rtol=1e-12, atol=0)


def test_the_classifier_is_sure_of_an_original_from_nine_tenths_on(bundle, monkeypatch):
    """docs/method.md §5: p >= .9, in every attribute."""
    monkeypatch.undo()  # the limit of this file's other tests
    target = parse_targets(["gender", "skin_tone"], bundle.attributes)
    recipe = resolve(tuple(target.classes), bundle.recipe, {"batch": 5, "lambda_face": 0.0})
    setup = Setup(replace(bundle, detector=None), recipe, target, (("a cook",),))
    p = torch.tensor(
        [[0.899, 0.95], [0.95, 0.899], [0.901, 0.901], [0.95, 0.5], [0.05, 0.99]], dtype=torch.float64
    )
    logits = {  # woman; light, and half of what is left for each of the others
        "gender": torch.stack([p[:, 0], 1 - p[:, 0]], 1).log(),
        "skin_tone": torch.stack([p[:, 1], *[(1 - p[:, 1]) / 2] * 2], 1).log(),
    }
    monkeypatch.setattr(Setup, "classify", lambda *_: logits)
    x = torch.zeros(5, 3, RESOLUTION, RESOLUTION, dtype=torch.float64)
    seen = terms.judged_pair(setup, x[:, :, :8, :8], x, x)
    assert seen.original_confident.tolist() == [False, False, True, False, True]
    assert seen.o_class.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing_with_faces(bundle, micro_batch):
    setup = with_faces(bundle)
    model, parameters = adapted(setup)
    whole, metrics = iteration_gradient(setup, model, parameters, 0)
    parts, of_parts = iteration_gradient(
        replace(setup, recipe=replace(setup.recipe, micro_batch=micro_batch)), model, parameters, 0
    )
    assert of_parts == {
        key: pytest.approx(value, rel=1e-11) if type(value) is float else value
        for key, value in metrics.items()
    }
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_where_nobody_has_a_face_only_the_image_loss_is_left(bundle):
    blind = replace(
        bundle, detector=lambda x: [DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2))] * len(x)
    )
    setup = with_faces(blind)
    model, parameters = adapted(setup)
    gradient, metrics = iteration_gradient(setup, model, parameters, 0)
    assert (metrics["faces"], metrics["align"], metrics["face"], metrics["confident"]) == (0, 0, 0, 0)
    assert "bias" not in metrics and metrics["counts"] == [0, 0]
    assert metrics["loss"] == pytest.approx(setup.recipe.lambda_img * metrics["image"], rel=1e-12)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradient)


def test_without_a_confident_target_the_image_may_change(bundle):
    setup = with_faces(bundle, C=1.0)
    model, parameters = adapted(setup)
    _, metrics = iteration_gradient(setup, model, parameters, 0)
    x, o = images_by_hand(setup, model, 0)
    assert metrics["align"] == metrics["face"] == metrics["confident"] == 0 < metrics["faces"]
    assert metrics["loss"] == pytest.approx(literal_loss(setup, x, o)[0].item(), rel=1e-11)


def test_a_detector_alone_brings_no_face_loss(bundle):
    setup = with_faces(replace(bundle, embedder=None, face_features=None))
    model, parameters = adapted(setup)
    _, metrics = iteration_gradient(setup, model, parameters, 0)
    assert "face" not in metrics and metrics["faces"] > 0
    none = with_faces(bundle, lambda_face=0.0)
    assert iteration_gradient(none, model, parameters, 0)[1] == metrics


def test_with_two_attributes_a_face_counts_where_one_is_confident_and_is_its_own_reference_where_all_agree(
    bundle, monkeypatch
):
    target = parse_targets(["gender", "skin_tone"], bundle.attributes)
    recipe = resolve(tuple(target.classes), bundle.recipe, {"batch": 4, "steps": 3, "C": 0.8})
    setup = Setup(bundle, recipe, target, (("a cook",),))
    model, _ = moved(setup)
    task = draw_task(setup, 0)
    table = solver_table(bundle.schedule, task.S)
    text = embed(model, task.prompt).detach()
    z_T = noise(0, 0, range(4), (4, RESOLUTION // 4, RESOLUTION // 4)).double()
    adapted_model = guided(model, text, task.guidance)
    run = Rollout(table, adapted_model, rollout(adapted_model, table, z_T), table.k)
    pair = draw_pair(setup, model, task, text, run)
    assert not torch.equal(pair.x, pair.o)
    (h,) = bundle.classifiers["finetune"]
    for n in range(4):
        face = face_of(pair.o[n])
        p = {} if face is None else h(crops(pair.o[n : n + 1], face, RESOLUTION))
        of_each = [p[name][0].softmax(0) for name in target.classes] if p else []
        assert bool(pair.original_confident[n]) == (bool(p) and all(float(x.max()) >= LIMIT for x in of_each))
        assert not p or pair.o_class[n].tolist() == [int(x.argmax()) for x in of_each]
    y = pair.o_class.clone()
    y[1, 1] = (y[1, 1] + 1) % 3  # disagrees in skin tone
    c = [[0.9, 0.9], [0.9, 0.9], [0.9, 0.5], [0.5, 0.5]]  # how certain each image's gender and skin tone are
    q = {name: torch.zeros(4, len(of_one), dtype=torch.float64) for name, of_one in target.classes.items()}
    for n in range(4):
        for a, rows in enumerate(q.values()):
            rows[n] = (1 - c[n][a]) / (rows.shape[1] - 1)
            rows[n, y[n, a]] = c[n][a]
    found = pair.faces.has_face
    embedded, own = [], []  # which images' faces the term embeds, and which of them are their own reference
    real = terms.embeddings

    def embeddings(setup, x, faces):
        embedded.append(faces.has_face)
        return real(setup, x, faces)

    def references(e, o, mask, external):
        own.append(mask)
        return o

    monkeypatch.setattr(terms, "embeddings", embeddings)
    monkeypatch.setattr(terms.losses, "face_references", references)
    everywhere = replace(pair, original_confident=torch.ones(4, dtype=torch.bool))
    values, _ = terms.face(terms.View(setup, task, pair.x, everywhere, q))
    (confident,), (its_own,) = embedded, own
    assert confident.tolist() == (torch.tensor([True, True, True, False]) & found).tolist()
    assert its_own.tolist() == torch.tensor([True, False, False, False])[confident].tolist()
    assert (values != 0).tolist() == confident.tolist()
    assert found[:3].sum() >= 2


@pytest.mark.parametrize("attribute", ["gender", None])
def test_L_text_is_the_distance_in_clip_of_an_image_and_its_prompt(bundle, attribute):
    """Alone, and beside the method's losses; its value and its gradient."""
    setup = with_faces(bundle, attribute, lambda_text=2.5, batch=4, steps=2)
    model, parameters = adapted(setup)
    clip, N, prompts = bundle.clip, setup.recipe.batch, set()
    for i in range(2):
        gradient, metrics = iteration_gradient(setup, model, parameters, i)
        x, o = images_by_hand(setup, model, i)
        prompts.add(metrics["prompt"])
        wanted = clip.encode_text(bundle.clip_tokenizer([metrics["prompt"]]))[0].detach()
        text = sum(
            1 - (e * wanted).sum() / (e.square().sum() * wanted.square().sum()).sqrt()
            for e in clip.encode_image(x)
        )
        loss = 2.5 * text / N + (literal_loss(setup, x, o)[0] if attribute else 0)
        assert metrics["text"] == pytest.approx(text.item() / N, rel=1e-11) and metrics["text"] > 0.1
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-11)
        for found, expected in zip(gradient, torch.autograd.grad(loss, parameters), strict=True):
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 * float(expected.abs().max()))
    assert len(prompts) == 2


# a run of all terms but one, or of those alone that can be without a target
WITHOUT = {
    "align": {"attribute": None},
    "image": {"attribute": None},
    "face": {"lambda_face": 0.0},
    "text": {"lambda_text": 0.0},
}


def test_the_loss_is_the_tables_terms_in_its_order_and_a_run_without_one_lacks_its_metric(bundle):
    assert WITHOUT.keys() == terms.TERMS.keys(), "a term more: say how a run is without it"
    own = OwnLoss(OwnFunction("own", bundle.path, "", lambda x, o, prompt, bundle: x.mean((1, 2, 3))), 3.0)

    recipe = {"lambda_text": 2.0, "lambda_face": 5.0, "steps": 1, "batch": 3, "C": 0.5}

    def ran(**change):
        setup = with_faces(bundle, **{**recipe, **change})
        setup = replace(setup, own_losses=(own,))
        model, parameters = adapted(setup)
        return setup, iteration_gradient(setup, model, parameters, 0)[1]

    setup, whole = ran()
    names = ["loss", *terms.TERMS, "own", *terms.STATISTICS]
    assert terms.sums_of(setup) == names == list(whole)[3:][: len(names)]  # after prompt, S and guidance
    weights = {"face": 5.0, "text": 2.0}
    for name, change in WITHOUT.items():
        setup, found = ran(**change)
        missing = {name} if name in weights else {"align", "image", "face", *terms.STATISTICS}
        assert terms.sums_of(setup) == [n for n in names if n not in missing]
        assert whole.keys() - found.keys() >= missing
        same = found.keys() & {*terms.TERMS, "own", *terms.STATISTICS}
        assert {n: found[n] for n in same} == {n: whole[n] for n in same}
        if name in weights:
            less = whole["loss"] - weights[name] * whole[name]
            assert abs(whole[name]) > 1e-3 and found["loss"] == pytest.approx(less, rel=1e-12)
        else:
            assert found["loss"] == pytest.approx(2 * whole["text"] + 3 * whole["own"], rel=1e-12)


def test_a_bundle_without_a_part_that_a_term_needs_is_refused(bundle):
    """Each row's parts, one at a time; what a term can go without is said instead."""
    setup = with_faces(bundle, lambda_text=1.0)
    needed = {part for term in terms.TERMS.values() for part in term.needs}
    assert needed == {"clip", "classifiers.finetune"}
    for part in needed:
        group, _, role = part.rpartition(".")
        less = {group: {k: v for k, v in bundle.classifiers.items() if k != role}} if group else {role: None}
        with pytest.raises(UserError, match=f"has no {part}, which the loss's term"):
            require_parts(replace(setup, bundle=replace(bundle, **less)))
    with pytest.raises(UserError, match="The loss has no term"):
        require_parts(with_faces(bundle, None))
    assert lacking(setup) == []
    plain = replace(bundle, detector=None, embedder=None, dino=None)
    assert lacking(with_faces(plain)) == [
        "no face detector: its classifiers look at whole images",
        "no DINO: L_img compares images by CLIP alone",
        "no face embedder: the loss has no L_face",
    ]
    assert lacking(with_faces(plain, lambda_face=0.0, lambda_img=0.0)) == [
        "no face detector: its classifiers look at whole images"
    ]
    assert lacking(with_faces(plain, None)) == []
