"""MTCNN with its public weights against facenet-pytorch's own findings (tests/golden/make_mtcnn.py)."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fairref.errors import UserError
from fairref.judges import mtcnn
from fairref.judges.mtcnn import MTCNN, scales, square, suppress
from fairref.weights_io import load_strict, read

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = Path(__file__).parents[1] / "weights" / "mtcnn" / "model.safetensors"

spec = importlib.util.spec_from_file_location("make_mtcnn", GOLDEN / "make_mtcnn.py")
maker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(maker)


@pytest.fixture(scope="module")
def detector():
    network = MTCNN().eval()
    load_strict(network, read(WEIGHTS), str(WEIGHTS))
    return network


@pytest.fixture(scope="module")
def photographs():
    pytest.importorskip("skimage")
    pytest.importorskip("matplotlib")
    return maker.photographs()


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "mtcnn.safetensors")


def batch(*images):
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


NAMES = sorted({key.rpartition(".")[0] for key in load_file(GOLDEN / "mtcnn.safetensors")})


@pytest.mark.parametrize("name", NAMES)
def test_finds_what_the_peer_finds(detector, photographs, golden, name):
    (found,) = detector(batch(photographs[name]))
    boxes, probability, landmarks = (golden[f"{name}.{key}"] for key in ("boxes", "probability", "landmarks"))
    assert len(found.boxes) == len(boxes)
    torch.testing.assert_close(found.boxes, boxes, atol=0.02, rtol=0)
    torch.testing.assert_close(found.probability, probability, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.landmarks, landmarks, atol=0.02, rtol=0)


def test_the_photographs_hold_faces_and_none(golden):
    """So that the comparison above compares something."""
    count = {name: len(golden[f"{name}.boxes"]) for name in NAMES}
    assert sum(n == 0 for n in count.values()) >= 2 and sum(n == 1 for n in count.values()) >= 6
    assert sum(n >= 2 for n in count.values()) >= 2


def test_images_of_a_batch_do_not_touch_each_other(detector, photographs):
    detector = copy.deepcopy(detector).double()
    first, second = photographs["astronaut"], photographs["mirrored"]
    nobody = np.full_like(first, 90)
    together = detector(batch(first, nobody, second, first))
    assert not len(together[1].boxes)
    for image, found in zip((first, nobody, second, first), together):
        (alone,) = detector(batch(image))
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.landmarks, alone.landmarks, rtol=0, atol=1e-9)


def test_no_graph_and_no_change_of_the_images(detector, photographs):
    x = batch(photographs["small"]).float().requires_grad_()
    before = x.detach().clone()
    (found,) = detector(x)
    assert not found.boxes.requires_grad and torch.equal(x, before)


@pytest.mark.parametrize("shape", [(3, 12, 200), (3, 20, 20), (3, 5, 5), (3, 300, 19)])
def test_images_without_room_for_a_face(detector, shape):
    (found,) = detector(torch.full((1, *shape), 128, dtype=torch.uint8))
    assert (
        found.boxes.shape == (0, 4) and found.probability.shape == (0,) and found.landmarks.shape == (0, 5, 2)
    )


def test_no_images(detector):
    assert detector(torch.zeros(0, 3, 64, 64, dtype=torch.uint8)) == []


def test_smallest_face_is_an_option(photographs):
    """Faces of fewer pixels than `smallest` fill no window of the pyramid."""
    network = MTCNN(smallest=200).eval()
    load_strict(network, read(WEIGHTS), str(WEIGHTS))
    assert len(network(batch(photographs["small"]))[0].boxes) == 0


def test_scales_halve_the_area_down_to_one_window():
    found = scales(512, 20)
    assert found[0] == 12 / 20 and found[1] / found[0] == pytest.approx(0.709)
    assert 512 * found[-1] >= 12 > 512 * found[-1] * 0.709
    assert scales(19, 20) == []


def test_square_keeps_the_centre_and_holds_the_box():
    boxes = torch.tensor([[10.0, 20, 30, 80], [0, 0, 9, 5]])
    squares = square(boxes)
    torch.testing.assert_close(squares[:, :2] + squares[:, 2:], boxes[:, :2] + boxes[:, 2:])
    size = squares[:, 2:] - squares[:, :2]
    assert torch.equal(size[:, 0], size[:, 1]) and size[:, 0].tolist() == [60, 9]


def test_suppress_by_union_and_by_the_smaller_box():
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4], [20, 20, 29, 29], [1, 0, 10, 9]])
    score, image = torch.tensor([0.9, 0.8, 0.95, 0.7]), torch.zeros(4, dtype=torch.long)
    assert suppress(boxes, score, image, 0.5).tolist() == [2, 0, 1]  # 36 of 81 shared; 72 of 90
    assert suppress(boxes, score, image, 0.3).tolist() == [2, 0]
    assert suppress(boxes, score, image, 0.95, of_smaller=True).tolist() == [2, 0, 3]  # the second lies in the first
    assert suppress(boxes[:0], score[:0], image[:0], 0.5).tolist() == []


def test_boxes_of_other_images_suppress_nothing():
    boxes = torch.tensor([[0.0, 0, 9, 9]]).expand(4, 4)
    score, image = torch.tensor([0.7, 0.8, 0.9, 0.6]), torch.tensor([1, 0, 1, 3])
    assert suppress(boxes, score, image, 0.5).tolist() == [1, 2, 3]


def test_batches_of_windows_change_nothing(detector, photographs, monkeypatch):
    (whole,) = detector(batch(photographs["pair"]))
    monkeypatch.setattr(mtcnn, "BATCH", 7)
    (parts,) = detector(batch(photographs["pair"]))
    torch.testing.assert_close(whole.boxes, parts.boxes, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"smallest": 0},
        {"smallest": "x"},
        {"thresholds": [0.5]},
        {"thresholds": 0.5},
        {"thresholds": [0, 1, 2]},
    ],
)
def test_settings_that_find_nothing_are_refused(options):
    with pytest.raises(UserError, match="expected"):
        MTCNN(**options)
