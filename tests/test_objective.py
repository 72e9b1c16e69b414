"""The loss of an iteration with faces and DINO is docs/method.md §5 case by case, and its gradient Algorithm A.1's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from test_trainer import moved
from tiny_bundle import FACE_SIDE, RESOLUTION, write_tiny_bundle

from fairref.bundle import load_bundle
from fairref.diffusion.sampler import noise
from fairref.diffusion.solver import solver_table, step
from fairref.fairness.attributes import parse_targets
from fairref.fairness.faces import TEMPLATE, Faces, Found, aligned, crops, square_around
from fairref.finetune import objective, rollout
from fairref.finetune.iteration import iteration_gradient, prompt_of, task_of
from fairref.finetune.recipes import resolve
from fairref.finetune.setup import Setup
from fairref.prompts import occupation_prompt, read_occupations

LIMIT = 0.6  # of "sure", so that some originals are and some are not


def detector(x):
    """Finds a face in about three of four pictures, somewhere that depends on all of its pixels."""
    found = []
    for total in x.long().sum((1, 2, 3)).tolist():
        if total % 4 == 0:
            found.append(Found(torch.zeros(0, 4), torch.zeros(0, 5, 2)))
            continue
        left, top, side = total % 7 - 2, total // 7 % 13, 12 + total // 91 % 9
        box = torch.tensor([left, top, left + side - 3, top + side], dtype=torch.float32)
        landmarks = torch.tensor(TEMPLATE) / 112 * side + torch.tensor([left, top])
        found.append(Found(box[None], landmarks[None]))
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = write_tiny_bundle(tmp_path_factory.mktemp("faces"), faces=True)
    bundle = load_bundle(folder, dtype=torch.float64)
    assert bundle.detector is not None and bundle.dino is not None and len(bundle.face_features) == 9
    return replace(bundle, detector=detector)


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setattr(objective, "SURE", LIMIT)


def make_setup(bundle, **recipe):
    target = parse_targets(["gender"], bundle.attributes)
    prompts = (tuple(map(occupation_prompt, read_occupations(bundle.path).train)),)
    recipe = {"batch": 7, "steps": 3, "guidance": 3.0, "C": 0.85, **recipe}
    return Setup(bundle, resolve(("gender",), bundle.recipe, recipe), target, prompts)


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
    cut = aligned(image[None], face, FACE_SIDE)
    return F.normalize(bundle.embedder(cut) + bundle.embedder(cut.flip(3)), dim=1)[0]


def pictures(setup, model, i):
    """x, with the graph of Algorithm A.1, and o."""
    bundle, r = setup.bundle, setup.recipe
    task, N = task_of(setup, i), r.batch
    S = task.S
    table = solver_table(bundle.schedule, S, r.end)
    t, abar = table.timesteps, bundle.schedule.alpha_bar[table.timesteps]
    C = abar.sqrt() * (1 - abar).sqrt() / bundle.schedule.beta[t]
    C = C / torch.prod(C) ** (1 / S)
    prompt = setup.prompts[0][prompt_of(r.seed, i, len(setup.prompts[0]), r.group)]
    z_T = noise(r.seed, i, range(N), (4, RESOLUTION // 4, RESOLUTION // 4)).double()

    def run(model):
        encoder = model.text_encoder
        c, c_empty = (encoder(bundle.tokenizer([text])).expand(N, -1, -1) for text in (prompt, ""))
        z, previous = z_T, None
        for j in range(S):
            e_empty, e_prompt = model.unet(z.detach(), t[j], c_empty), model.unet(z.detach(), t[j], c)
            e = e_empty + task.guidance * (e_prompt - e_empty)
            if e.requires_grad:
                e.register_hook(lambda grad, j=j: C[j] * grad)
            z, previous = step(table, j, z, e, previous), (z, e)
        return bundle.vae.decode(z).clamp(-1, 1)

    x = run(model)
    with torch.no_grad():
        return x, run(bundle)


def literal_loss(setup, x, o):
    """docs/method.md §3-5, image by image -> loss, and the cases that occurred."""
    bundle, r, N = setup.bundle, setup.recipe, setup.recipe.batch
    h, D_F = bundle.classifiers["finetune"], F.normalize(bundle.face_features.double(), dim=1)
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
    setup = make_setup(bundle, lambda_img=40.0, lambda_face=3.0, face_reference=reference)
    model, parameters = adapted(setup)
    seen = set()
    for i in range(5):
        gradient, metrics = iteration_gradient(setup, model, parameters, i)
        x, o = pictures(setup, model, i)
        loss, cases = literal_loss(setup, x, o)
        seen |= cases
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-11)
        for found, wanted in zip(gradient, torch.autograd.grad(loss, parameters)):
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


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_change_nothing_with_faces(bundle, micro_batch):
    setup = make_setup(bundle)
    model, parameters = adapted(setup)
    whole, metrics = iteration_gradient(setup, model, parameters, 0)
    parts, of_parts = iteration_gradient(
        replace(setup, recipe=replace(setup.recipe, micro_batch=micro_batch)), model, parameters, 0
    )
    assert of_parts == {
        key: pytest.approx(value, rel=1e-11) if type(value) is float else value
        for key, value in metrics.items()
    }
    for a, b in zip(parts, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_where_nobody_has_a_face_only_the_image_loss_is_left(bundle):
    blind = replace(bundle, detector=lambda x: [Found(torch.zeros(0, 4), torch.zeros(0, 5, 2))] * len(x))
    setup = make_setup(blind)
    model, parameters = adapted(setup)
    gradient, metrics = iteration_gradient(setup, model, parameters, 0)
    assert (metrics["faces"], metrics["align"], metrics["face"], metrics["confident"]) == (0, 0, 0, 0)
    assert "bias" not in metrics and metrics["counts"] == [0, 0]
    assert metrics["loss"] == pytest.approx(setup.recipe.lambda_img * metrics["image"], rel=1e-12)
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradient)


def test_without_a_confident_target_the_image_may_change(bundle):
    setup = make_setup(bundle, C=1.0)
    model, parameters = adapted(setup)
    _, metrics = iteration_gradient(setup, model, parameters, 0)
    x, o = pictures(setup, model, 0)
    assert metrics["align"] == metrics["face"] == metrics["confident"] == 0 < metrics["faces"]
    assert metrics["loss"] == pytest.approx(literal_loss(setup, x, o)[0].item(), rel=1e-11)


def test_a_detector_alone_brings_no_face_loss(bundle):
    setup = make_setup(replace(bundle, embedder=None, face_features=None))
    model, parameters = adapted(setup)
    _, metrics = iteration_gradient(setup, model, parameters, 0)
    assert "face" not in metrics and metrics["faces"] > 0
    none = make_setup(bundle, lambda_face=0.0)
    assert iteration_gradient(none, model, parameters, 0)[1] == metrics


def test_with_two_attributes_a_face_counts_where_one_is_confident_and_is_its_own_reference_where_all_agree(
    bundle, monkeypatch
):
    target = parse_targets(["gender", "skin_tone"], bundle.attributes)
    recipe = resolve(tuple(target.classes), bundle.recipe, {"batch": 4, "steps": 3, "C": 0.8})
    setup = Setup(bundle, recipe, target, (("a cook",),))
    model, _ = moved(setup)
    task = task_of(setup, 0)
    table = solver_table(bundle.schedule, task.S)
    both = rollout.embed(model, task.prompt).detach()
    z_T = noise(0, 0, range(4), (4, RESOLUTION // 4, RESOLUTION // 4)).double()
    path = rollout.rollout(model, table, z_T, *both.split(1), task.guidance)
    pictures = objective.look(setup, model, table, path, task, both)
    for n in range(4):
        face = face_of(pictures.o[n])
        p = (
            {}
            if face is None
            else bundle.classifiers["finetune"](crops(pictures.o[n : n + 1], face, RESOLUTION))
        )
        of_each = [p[name][0].softmax(0) for name in target.classes] if p else []
        assert bool(pictures.o_sure[n]) == (bool(p) and all(float(x.max()) >= LIMIT for x in of_each))
        assert not p or pictures.o_class[n].tolist() == [int(x.argmax()) for x in of_each]
    seen = []
    monkeypatch.setattr(objective, "face_part", lambda s, x, p, *masks: seen.append(masks) or x.new_zeros(0))
    y = pictures.o_class.clone()
    y[1, 1] = (y[1, 1] + 1) % 3  # disagrees in skin tone
    c = [[0.9, 0.9], [0.9, 0.9], [0.9, 0.5], [0.5, 0.5]]  # how certain each image's gender and skin tone are
    q = {name: torch.zeros(4, len(of_one), dtype=torch.float64) for name, of_one in target.classes.items()}
    for n in range(4):
        for a, rows in enumerate(q.values()):
            rows[n] = (1 - c[n][a]) / (rows.shape[1] - 1)
            rows[n, y[n, a]] = c[n][a]
    objective.loss_of(setup, pictures.x, pictures, q)
    ((confident, agree),) = seen
    found = pictures.faces.found
    assert confident.tolist() == (torch.tensor([True, True, True, False]) & found).tolist()
    assert agree.tolist() == (torch.tensor([True, False, False, False]) & found).tolist()
    assert found[:3].sum() >= 2
