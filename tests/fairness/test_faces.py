"""Faces: which counts, what is cut out of the image, and the gradient that flows back."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from fairref.fairness import faces
from fairref.fairness.faces import (
    ALIGNED,
    BLACK,
    TEMPLATE,
    DetectedFaces,
    Faces,
    MTCNNDetector,
    align_crops,
    area,
    crops,
    find,
    inside,
    scale_gradient,
    shared_boxes,
    similarity,
    square_around,
    to_bytes,
)
from fairref.files.weights import load_strict, read
from fairref.judges.mtcnn import MTCNN

WEIGHTS = Path(__file__).parents[2] / "weights" / "mtcnn" / "model.safetensors"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(M=1, seed=0, scale=1.5, centre=(60.0, 50.0)):
    """Landmarks like a face's, turned and moved: (M, 5, 2) float64."""
    g = seeded(seed)
    angle = torch.rand(M, 1, 1, generator=g, dtype=torch.float64) - 0.5
    p = torch.tensor(TEMPLATE, dtype=torch.float64) - 56
    turn = torch.cat([torch.cat([angle.cos(), -angle.sin()], 2), torch.cat([angle.sin(), angle.cos()], 2)], 1)
    jitter = 2 * torch.randn(M, 5, 2, generator=g, dtype=torch.float64)
    return (p @ turn.transpose(1, 2)) / scale + torch.tensor(centre, dtype=torch.float64) + jitter


def of(found, boxes=(), landmarks=None):
    M = sum(found)
    landmarks = points(M) if landmarks is None else landmarks
    boxes = torch.tensor(boxes, dtype=torch.float64).view(M, 4)
    return Faces(torch.tensor(found), boxes, landmarks)


def test_the_largest_face_inside_the_image_counts():
    boxes = torch.tensor(
        [
            [[2.0, 2, 12, 12], [10, 10, 30, 30], [-100, -100, 8, 8]],  # 100, 400 and, of 11664, 64 inside
            [[60, 60, 90, 90], [5, 5, 6, 6], [-9, -9, -1, -1]],  # the first lies outside
            [[50, 50, 60, 60], [-9, -9, -1, -1], [-20, 0, 0, 40]],  # none inside
        ]
    )
    marks = torch.arange(90.0).view(3, 3, 5, 2)

    def detector(x):
        assert x.dtype == torch.uint8 and x.shape == (4, 3, 40, 50)
        seen = [DetectedFaces(b, m) for b, m in zip(boxes, marks, strict=True)]
        return [seen[0], seen[1], DetectedFaces(boxes[0, :0], marks[0, :0]), seen[2]]

    found = find(detector, torch.zeros(4, 3, 40, 50))
    assert found.has_face.tolist() == [True, True, False, False]
    assert found.boxes.tolist() == [[5, 5, 35, 35], [4.75, 4.75, 6.25, 6.25]]
    assert torch.equal(found.landmarks, torch.stack([marks[0, 1], marks[1, 1]]))


def test_no_images_and_no_faces():
    nothing = find(lambda x: pytest.fail("nothing to look at"), torch.zeros(0, 3, 8, 8))
    assert (
        len(nothing.has_face) == 0 and nothing.boxes.shape == (0, 4) and nothing.landmarks.shape == (0, 5, 2)
    )
    nobody = find(
        lambda x: [DetectedFaces(torch.zeros(0, 4), torch.zeros(0, 5, 2))] * 2, torch.zeros(2, 3, 8, 8)
    )
    x = torch.zeros(2, 3, 8, 8, requires_grad=True)
    assert crops(x, nobody).shape == (0, 3, 224, 224) and align_crops(x, nobody).shape == (0, 3, 112, 112)
    loss = crops(x, nobody).sum() + align_crops(x, nobody).sum()
    assert loss == 0 and nobody.has_face.tolist() == [False, False]


def test_bytes_are_rounded_and_clamped():
    x = torch.tensor([-1.5, -1, 0, 0.9999, 1, 2], requires_grad=True)
    assert to_bytes(x).tolist() == [0, 0, 128, 255, 255, 255] and not to_bytes(x).requires_grad


def test_square_around_keeps_the_centre():
    box = torch.tensor([[10.0, 20, 30, 60]])
    assert square_around(box, 0.5).tolist() == [[-10, 10, 50, 70]] and square_around(box, 0).tolist() == [
        [0, 20, 40, 60]
    ]
    assert area(inside(square_around(box, 0.5), 100, 40)).tolist() == [40 * 60]


def test_a_crop_of_whole_pixels_is_the_image_itself():
    x = torch.rand(2, 3, 40, 50, generator=seeded(), dtype=torch.float64)
    cut = crops(x, of([False, True], [[7, 9, 31, 33]]), 24)
    torch.testing.assert_close(cut, x[1:, :, 9:33, 7:31], rtol=0, atol=1e-12)


def test_the_sides_of_a_crop_go_to_the_nearest_pixels():
    """Up and down, each side on its own, inside the image and outside."""
    x = torch.rand(1, 3, 40, 50, generator=seeded(3), dtype=torch.float64)
    for low, high in ((7, 9), (-3, 4)):
        for shift in itertools.product((-0.4, 0.4), repeat=4):
            box = [a + b for a, b in zip((low, high, low + 24, high + 24), shift, strict=True)]
            left = max(low, 0)
            cut = crops(x, of([True], [box]), 24)
            wanted = x[:, :, high : high + 24, left : low + 24]
            torch.testing.assert_close(cut[:, :, :, left - low :], wanted, rtol=0, atol=1e-12)
            assert (cut[:, :, :, : left - low] == BLACK).all()


def test_a_crop_is_black_outside_the_image():
    x = torch.rand(1, 3, 20, 20, generator=seeded(), dtype=torch.float64)
    cut = crops(x, of([True], [[-8, 12, 16, 36]]), 24)
    assert (cut[:, :, :, :8] == BLACK).all() and (cut[:, :, 8:] == BLACK).all()
    torch.testing.assert_close(cut[:, :, :8, 8:], x[:, :, 12:, :16], rtol=0, atol=1e-12)


def test_a_large_crop_is_smoothed_before_it_shrinks():
    """Against Pillow's bilinear resize of the same pixels, which widens its filter alike."""
    from PIL import Image

    picture = torch.rand(60, 60, generator=seeded(1))
    cut = crops(picture.expand(1, 3, 60, 60), of([True], [[0, 0, 60, 60]]), 15)[0, 0]
    peer = np.asarray(Image.fromarray(picture.numpy()).resize((15, 15), Image.Resampling.BILINEAR))
    torch.testing.assert_close(cut, torch.from_numpy(peer.copy()), rtol=0, atol=1e-5)


def test_the_similarity_is_the_peers():
    transform = pytest.importorskip("skimage.transform")
    marks = points(4, seed=3)
    ours = similarity(marks)
    for p, found in zip(marks.numpy(), ours, strict=True):
        peer = transform.SimilarityTransform.from_estimate(p, np.array(TEMPLATE) + 0.5)
        torch.testing.assert_close(found, torch.from_numpy(peer.params[:2]), rtol=1e-10, atol=1e-10)


def test_landmarks_in_one_place_stop_nothing():
    """As a detector of someone else's might give them; there is no turn and no scale to find."""
    x = torch.rand(1, 3, 20, 20, generator=seeded(), dtype=torch.float64).requires_grad_()
    flat = Faces(torch.tensor([True]), torch.tensor([[2.0, 2, 9, 9]]), torch.full((1, 5, 2), 7.0))
    cut = align_crops(x, flat)
    (g,) = torch.autograd.grad(cut.sum(), x)
    assert cut.isfinite().all() and g.isfinite().all()


def test_the_similarity_is_the_least_squares_one():
    (marks,) = points(1, seed=5)
    x, y = marks.T
    rows = torch.stack(
        [torch.stack([x, -y, x * 0 + 1, x * 0], 1), torch.stack([y, x, x * 0, x * 0 + 1], 1)], 1
    )
    wanted = (torch.tensor(TEMPLATE, dtype=torch.float64) + 0.5).flatten()
    a, b, u, v = torch.linalg.lstsq(rows.flatten(0, 1), wanted[:, None]).solution.flatten().tolist()
    torch.testing.assert_close(
        similarity(marks[None])[0], torch.tensor([[a, -b, u], [b, a, v]], dtype=torch.float64)
    )


def test_aligned_faces_are_the_peers():
    """skimage counts from the centres of the pixels, hence the halves."""
    transform = pytest.importorskip("skimage.transform")
    x = torch.rand(1, 3, 90, 110, generator=seeded(2), dtype=torch.float64) * 2 - 1
    marks = points(1, seed=7, scale=1.1)
    ours = align_crops(x, of([True], [[0, 0, 9, 9]], marks))[0]
    there = transform.SimilarityTransform.from_estimate(marks[0].numpy() - 0.5, np.array(TEMPLATE))
    image = x[0].permute(1, 2, 0).numpy()
    peer = transform.warp(image, there.inverse, output_shape=(ALIGNED, ALIGNED), order=1, cval=BLACK)
    difference = (ours.permute(1, 2, 0) - torch.from_numpy(peer)).abs().amax(2)
    assert ours.std() > 0.1 and (ours == BLACK).any()
    # half a pixel around the image the peer mixes in nothing where ours mixes in black
    assert (difference < 1e-9).float().mean() > 0.97


def test_landmarks_come_to_lie_on_the_template():
    """A bright pixel under an eye appears where the template has that eye."""
    size, (u, v) = 112, TEMPLATE[0]
    marks = torch.tensor(TEMPLATE, dtype=torch.float64)[None] + 0.5 + torch.tensor([10.0, -4.0])
    x = torch.full((1, 1, size, size), -1.0, dtype=torch.float64)
    x[0, 0, round(v) - 4, round(u) + 10] = 1
    seen = align_crops(x, of([True], [[0, 0, 9, 9]], marks))[0, 0]
    assert divmod(int(seen.argmax()), size) == (round(v), round(u))


@pytest.mark.parametrize(
    "cut", [lambda x, f: crops(x, f, 6), lambda x, f: align_crops(x, f, 5)], ids=["crops", "aligned"]
)
def test_gradients_reach_the_image(cut):
    x = (torch.rand(2, 1, 12, 14, generator=seeded(4), dtype=torch.float64) * 2 - 1).requires_grad_()
    boxes = [[-2, 1, 9, 12], [3, 2, 8, 7]]
    found = of([True, True], boxes, points(2, seed=8, scale=8, centre=(7.0, 6.0)))
    assert torch.autograd.gradcheck(lambda x: cut(x, found), x)
    (g,) = torch.autograd.grad(cut(x, found).sum(), x)
    assert (g.flatten(1).abs().sum(1) > 0).all()


def test_images_without_a_face_are_left_out_in_order():
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 20, 20) / 4
    found = of(
        [True, False, False, True], [[2, 2, 10, 10], [2, 2, 10, 10]], points(2, centre=(10.0, 10.0), scale=9)
    )
    for cut in (crops(x, found, 4), align_crops(x, found, 112)[:, :, 50:60, 50:60]):
        assert cut.flatten(1).mean(1).tolist() == pytest.approx([0, 0.75])


def test_the_region_rule_is_one_of_the_gradient_alone():
    x = torch.rand(3, 3, 6, 8, generator=seeded(6), dtype=torch.float64, requires_grad=True)
    boxes = [torch.tensor([1.0, 2, 4, 5]), None, torch.tensor([-5.0, 3.6, 1.4, 99])]
    factors = torch.tensor([0.25, 0.5, 0.0], dtype=torch.float64)
    y = scale_gradient(x, boxes, factors)
    assert torch.equal(y, x)
    (g,) = torch.autograd.grad((y**2).sum(), x)
    m = torch.ones(3, 1, 6, 8, dtype=torch.float64)
    m[0, :, 2:5, 1:4] = 0.25
    m[2, :, 4:, :1] = 0  # pixel centres: 3.5 is above the box, 0.5 in it, 1.5 not
    torch.testing.assert_close(g, 2 * x.detach() * m)


def test_shared_boxes_are_the_intersection_of_images_that_both_have_a_face():
    a = of([True, True, False, True], [[0, 0, 10, 10], [0, 0, 4, 4], [1, 2, 3, 4]])
    b = of([True, False, True, True], [[5, -5, 20, 6], [0, 0, 9, 9], [3, 2, 9, 9]])
    shared = shared_boxes(a, b)
    assert shared[0].tolist() == [5, 0, 10, 6] and shared[1:] == [None, None, None]


def test_mtcnn_finds_the_photographs_face_where_it_is():
    data = pytest.importorskip("skimage.data")
    network = MTCNN().eval()
    load_strict(network, read(WEIGHTS), str(WEIGHTS))
    image = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None]
    x = image / 127.5 - 1
    found = find(MTCNNDetector(network), torch.cat([x, torch.zeros_like(x)]))
    assert found.has_face.tolist() == [True, False]
    (box,) = found.boxes.tolist()
    assert box == pytest.approx([142, 34.5, 307, 199.5], abs=2)  # 110 high, and half of it more
    eyes, nose, mouth = found.landmarks[0, :2], found.landmarks[0, 2], found.landmarks[0, 3:]
    assert eyes[0, 0] < nose[0] < eyes[1, 0] and eyes[:, 1].max() < nose[1] < mouth[:, 1].min()
    face = align_crops(x, Faces(torch.tensor([True]), found.boxes, found.landmarks))
    assert face.shape == (1, 3, 112, 112) and faces.to_bytes(face).float().std() > 20
