"""Eqs 6 and 7 and the dynamic weights against a literal transcription, values and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from fairref.fairness.faces import scale_gradient
from fairref.fairness.losses import (
    agreement,
    align_loss,
    confident_targets,
    dynamic_weights,
    face_loss,
    face_references,
    image_loss,
    nearest_faces,
    region_factors,
)
from fairref.fairness.transport import expected_ot

N, K, C = 8, 3, 0.6
TARGET = (0.5, 0.3, 0.2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def clip_like(x):
    return torch.tanh(x.flatten(1) @ draw(48, 5, seed=1))


def dino_like(x):
    return (x.flatten(1) @ draw(48, 7, seed=2)).sin() + 0.1


def literal_align(logits, q):
    """Eq 6, image by image."""
    total = 0.0
    for i in range(N):
        y = max(range(K), key=lambda k: q[i, k])
        if q[i, y] >= C:
            total = total - torch.log(torch.exp(logits[i, y]) / torch.exp(logits[i]).sum())
    return total / N


def literal_image(x, o, features, weights=(1.0,) * N):
    """Eq 7, image by image, each times its λ."""
    total = 0.0
    for i in range(N):
        for f in features:
            a, b = f(x[i : i + 1])[0], f(o[i : i + 1])[0]
            total = total + weights[i] * (1 - (a @ b) / (a.norm() * b.norm()))
    return total / N


def gradient(value, x):
    return torch.autograd.grad(value, x, retain_graph=True)[0]


def test_align_loss_is_eq_6_with_its_gradient():
    logits = draw(N, K).mul(2).requires_grad_()
    q = expected_ot(logits, TARGET).q
    values, confident = align_loss(logits, q, C, N)
    expected = literal_align(logits, q)
    assert 0 < confident.sum() < N and confident.dtype == torch.bool and values.shape == (N,)
    assert (values[~confident] == 0).all() and (values[confident] > 0).all()
    assert torch.allclose(values.sum(), expected, rtol=1e-12)
    grad = gradient(values.sum(), logits)
    assert torch.allclose(grad, gradient(expected, logits), rtol=1e-12, atol=1e-15)
    assert (grad[~confident] == 0).all()
    one_hot = torch.eye(K, dtype=torch.float64)[q.argmax(1)]
    assert torch.allclose(grad, (logits.softmax(1) - one_hot) * confident[:, None] / N)


def test_the_confidence_threshold_is_inclusive():
    q = torch.tensor([[0.8, 0.2], [0.2, 0.8], [0.79, 0.21], [0.5, 0.5]], dtype=torch.float64)
    y, confident = confident_targets(q, 0.8)
    assert y.tolist()[:3] == [0, 1, 0] and confident.tolist() == [True, True, False, False]


def test_an_image_without_a_target_never_counts():
    q = torch.tensor([[0.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    assert confident_targets(q, 0.0)[1].tolist() == [False, True]


def test_a_batch_with_no_confident_target_has_a_zero_loss_that_still_has_a_gradient():
    logits = torch.zeros(4, 2, requires_grad=True)
    values, confident = align_loss(logits, expected_ot(logits, (0.5, 0.5)).q, 0.8, 4)
    assert not confident.any() and values.sum() == 0
    assert (gradient(values.sum(), logits) == 0).all()
    weights = dynamic_weights(
        {"gender": agreement(torch.zeros(4), confident, torch.zeros(4))}, 8, {"gender": 1.6}
    )
    assert torch.allclose(weights, torch.full((4,), 1.6, dtype=torch.float64))


def test_a_batch_without_images():
    values, confident = align_loss(torch.zeros(0, 2), torch.zeros(0, 2), 0.8, 8)
    assert values.sum() == 0 and confident.shape == (0,)


@pytest.mark.parametrize("features", [(clip_like,), (clip_like, dino_like)])
def test_image_loss_is_eq_7_with_its_gradient(features):
    x, o = draw(N, 3, 4, 4, seed=3).requires_grad_(), draw(N, 3, 4, 4, seed=4)
    values, expected = image_loss(x, o, features, N), literal_image(x, o, features)
    assert values.shape == (N,)
    assert torch.allclose(values.sum(), expected, rtol=1e-12)
    assert torch.allclose(gradient(values.sum(), x), gradient(expected, x), rtol=1e-9, atol=1e-15)


def test_image_loss_is_0_for_the_same_image_and_sends_nothing_to_the_original():
    x, o = draw(N, 3, 4, 4).requires_grad_(), draw(N, 3, 4, 4, seed=5).requires_grad_()
    assert image_loss(x, x, (clip_like, dino_like), N).abs().max() < 1e-12
    image_loss(x, o, (clip_like,), N).sum().backward()
    assert o.grad is None and x.grad.abs().max() > 0


def test_dynamic_weights_follow_the_agreement_of_target_and_original():
    y, original = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1])
    confident = torch.tensor([True, True, True, False])
    agree = agreement(y, confident, original)
    assert agree.tolist() == [True, False, True, False]
    weights = dynamic_weights({"gender": agree}, 8.0, {"gender": 1.6})
    assert torch.allclose(weights, torch.tensor([8.0, 1.6, 8.0, 1.6], dtype=torch.float64))


def test_of_several_attributes_the_smallest_weight_of_those_that_disagree_counts():
    agrees = {
        "gender": torch.tensor([True, True, False, False]),
        "race": torch.tensor([True, False, True, False]),
    }
    for order in (("gender", "race"), ("race", "gender")):
        weights = dynamic_weights({name: agrees[name] for name in order}, 8, {"gender": 1.6, "race": 4.8})
        assert torch.allclose(weights, torch.tensor([8.0, 4.8, 1.6, 1.6], dtype=torch.float64))


def test_the_total_and_its_gradient_are_the_literal_sum():
    x, o = draw(N, 3, 4, 4, seed=6).requires_grad_(), draw(N, 3, 4, 4, seed=7)
    h = draw(48, K, seed=8)
    logits = x.flatten(1) @ h
    q = expected_ot(logits, TARGET).q
    original = (q.argmax(1) + torch.arange(N) % 2) % K  # every other one agrees
    align, confident = align_loss(logits, q, C, N)
    agree = agreement(q.argmax(1), confident, original)
    weights = dynamic_weights({"race": agree}, 6, {"race": 3.6})
    assert 0 < agree.sum() < N
    total = align.sum() + (weights * image_loss(x, o, (clip_like, dino_like), N)).sum()
    by_hand = [6.0 if q[i].max() >= C and q[i].argmax() == original[i] else 3.6 for i in range(N)]
    expected = literal_align(logits, q) + literal_image(x, o, (clip_like, dino_like), by_hand)
    assert torch.allclose(total, expected, rtol=1e-6)
    assert torch.allclose(gradient(total, x), gradient(expected, x), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1, 5, 2), (1,) * 8])
def test_splitting_the_batch_changes_neither_loss_nor_gradient(sizes):
    """As over processes or micro-batches: q from all N images, each part divided by the global N."""
    x, o = draw(N, 3, 4, 4, seed=6).requires_grad_(), draw(N, 3, 4, 4, seed=7)
    h = draw(48, K, seed=8)
    q = expected_ot(x.flatten(1) @ h, TARGET).q

    def loss(part):
        align, _ = align_loss(x[part].flatten(1) @ h, q[part], C, N)
        return align.sum() + image_loss(x[part], o[part], (clip_like,), N).sum()

    parts = torch.arange(N).split(list(sizes))
    whole, split = loss(slice(None)), sum(loss(part) for part in parts)
    assert torch.allclose(whole, split, rtol=1e-12)
    assert torch.allclose(gradient(whole, x), gradient(split, x), rtol=1e-10, atol=1e-15)


def test_cross_entropy_stays_finite_for_certain_classifiers():
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    values, _ = align_loss(logits, torch.tensor([[0.0, 1.0]]), 0.8, 1)
    assert values.item() == pytest.approx(200)
    assert torch.allclose(gradient(values.sum(), logits), torch.tensor([[1.0, -1.0]]))
    assert math.isclose(F.cross_entropy(logits, torch.tensor([1])).item(), 200)


FACES = torch.tensor([True, True, True, False, True, False, True, True])
ORIGINAL_FACES = torch.tensor([True, True, False, True, True, False, True, False])
AGREES = {
    "gender": torch.tensor([True, False, True, True, False, False, True, False]),
    "race": torch.tensor([True, True, True, False, False, True, False, True]),
}


def test_weights_of_images_with_and_without_faces():
    """The cases of docs/method.md, one by one: agree; one disagrees; no face in o; none in x; and so on."""
    found = dynamic_weights(AGREES, 8, {"gender": 1.6, "race": 4.8}, FACES, ORIGINAL_FACES)
    torch.testing.assert_close(found, torch.tensor([8, 1.6, 1.6, 8, 1.6, 8, 4.8, 1.6], dtype=torch.float64))
    assert torch.equal(
        dynamic_weights(AGREES, 8, {"gender": 1.6, "race": 4.8}, FACES | True, ORIGINAL_FACES | True),
        dynamic_weights(AGREES, 8, {"gender": 1.6, "race": 4.8}),
    )


def test_region_factors_are_those_of_the_attributes_that_disagree():
    found = region_factors(AGREES, {"gender": 0.2, "race": 0.3})
    torch.testing.assert_close(found, torch.tensor([1, 0.2, 1, 0.3, 0.2, 0.2, 0.3, 0.2], dtype=torch.float64))


def test_the_region_rule_scales_what_L_img_sends_into_the_box():
    """dL/dx of L_align + λ L_img with the rule: inside the box λ3, outside λ2, and L_align whole."""
    x, o = draw(N, 3, 4, 4, seed=6).requires_grad_(), draw(N, 3, 4, 4, seed=7)
    h = draw(48, K, seed=8)
    q = expected_ot(x.flatten(1) @ h, TARGET).q
    align, _ = align_loss(x.flatten(1) @ h, q, 0.0, N)
    boxes = [torch.tensor([1.0, 0, 3, 4])] * (N - 1) + [None]
    factors = torch.linspace(0.1, 0.8, N, dtype=torch.float64)
    weights = torch.linspace(1, 8, N, dtype=torch.float64)
    image = image_loss(scale_gradient(x, boxes, factors), o, (clip_like, dino_like), N)
    found = gradient(align.sum() + (weights * image).sum(), x)
    of_align = gradient(align.sum(), x)
    of_image = gradient(literal_image(x, o, (clip_like, dino_like), weights), x)
    for i in range(N):
        for column in range(4):
            m = factors[i] if boxes[i] is not None and 1 <= column < 3 else 1.0
            expected = of_align[i, :, :, column] + m * of_image[i, :, :, column]
            assert torch.allclose(found[i, :, :, column], expected, rtol=1e-9, atol=1e-15)


def unit(*shape, seed):
    return F.normalize(draw(*shape, seed=seed), dim=1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_face_loss_is_one_minus_the_largest_cosine_with_its_gradient(chunk):
    embeddings, external = draw(5, 16, seed=9).requires_grad_(), unit(50, 16, seed=10)
    values = face_loss(embeddings, nearest_faces(embeddings, external, chunk), N)
    expected = 0.0
    for e in embeddings:
        expected = expected + 1 - max((e @ f) / (e.norm() * f.norm()) for f in external)
    assert values.shape == (5,) and torch.allclose(values.sum(), expected / N, rtol=1e-12)
    assert torch.allclose(gradient(values.sum(), embeddings), gradient(expected / N, embeddings), rtol=1e-9)


def test_a_face_nobody_outside_resembles_still_has_a_nearest():
    """All cosines are negative."""
    e = torch.tensor([[1.0, 0.0]])
    external = torch.tensor([[-1.0, 0.0], [-0.6, 0.8]])
    assert torch.equal(nearest_faces(e, external), external[1:])
    assert face_loss(e, external[1:], 2).item() == pytest.approx(0.8)


def test_the_original_face_is_the_reference_where_it_is_sure():
    embeddings, own, external = draw(4, 16, seed=11), unit(4, 16, seed=12), unit(9, 16, seed=13)
    sure = torch.tensor([True, False, False, True])
    found = face_references(embeddings, own, sure, external)
    nearest = nearest_faces(embeddings, external)
    for i in range(4):
        assert torch.equal(found[i], own[i] if sure[i] else nearest[i])


def test_a_batch_without_faces_has_no_face_loss():
    embeddings = torch.zeros(0, 16, requires_grad=True)
    values = face_loss(embeddings, nearest_faces(embeddings, torch.eye(16)), N)
    assert values.shape == (0,) and values.sum() == 0
