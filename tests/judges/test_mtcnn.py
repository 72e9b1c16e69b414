"""MTCNN with its public weights against facenet-pytorch's own findings (tests/golden/make_mtcnn.py)."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fairref.errors import UserError
from fairref.files.weights import load_strict, read
from fairref.judges import mtcnn
from fairref.judges.mtcnn import MTCNN, scales, square, suppress

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = Path(__file__).parents[2] / "weights" / "mtcnn" / "model.safetensors"

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
    for image, found in zip((first, nobody, second, first), together, strict=True):
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
    assert suppress(boxes, score, image, 0.95, of_smaller=True).tolist() == [
        2,
        0,
        3,
    ]  # the second lies in the first
    assert suppress(boxes[:0], score[:0], image[:0], 0.5).tolist() == []


# what two boxes share
INSIDE = [[2.0, 2, 61, 61], [12.0, 12, 51, 51]]  # .44 of the union, all of the smaller one
BESIDE = [[2.0, 2, 61, 61], [12.0, 2, 71, 61]]  # .71 of the union, .83 of the smaller one
APART = [[2.0, 2, 61, 61], [17.0, 2, 76, 61]]  # .6 of the union, .75 of the smaller one


@pytest.mark.parametrize(
    "boxes, second, last", [(INSIDE, 2, 1), (BESIDE, 1, 1), (APART, 2, 1)], ids=["inside", "beside", "apart"]
)
def test_the_second_network_goes_by_the_union_and_the_last_by_the_smaller_box(boxes, second, last):
    """Networks that take every window for a face and move none of them. The limit is .7."""
    network = MTCNN()

    def sure(x):
        return 0.9 - 0.01 * torch.arange(len(x))

    network.rnet.forward = lambda x: (torch.zeros(len(x), 4), sure(x))
    network.onet.forward = lambda x: (torch.zeros(len(x), 4), torch.zeros(len(x), 10), sure(x))
    x, image = torch.zeros(1, 3, 90, 90), torch.zeros(2, dtype=torch.long)
    found, _ = network.refine(x, torch.tensor(boxes), image)
    assert found.tolist() == boxes[:second]
    (found, *_), _ = network.settle(x, torch.tensor(boxes), image)
    assert found.tolist() == boxes[:last]


def test_the_first_network_goes_by_the_union_at_a_half_in_one_scale_and_seven_tenths_across():
    """A network that sees faces in chosen places of its maps: (scale, row, column)."""

    def proposals(*places):
        network, seen = MTCNN(smallest=12), []

        def pnet(x):
            size, scale = [(n - 12) // 2 + 1 for n in x.shape[2:]], len(seen)
            seen.append(scale)
            probability = torch.zeros(1, *size)
            for n, (at, row, column) in enumerate(places):
                if at == scale:
                    probability[0, row, column] = 0.99 - 0.01 * n
            return torch.zeros(1, 4, *size), probability

        network.pnet.forward = pnet
        return len(network.propose(torch.zeros(1, 3, 48, 48))[0])

    assert scales(48, 12)[:2] == [1, 0.709]
    # in the first scale windows are 11 wide; one column is 2 pixels: 9 / 13 = .69 of the union, two: 7 / 15 = .47
    assert proposals((0, 3, 3), (0, 3, 4)) == 1 and proposals((0, 3, 3), (0, 3, 5)) == 2
    # in the second, window 0 is [1, 16]: 15 wide. With [1, 12] it shares 121 / 225 = .54, which is enough in one scale
    assert proposals((0, 0, 0), (1, 0, 0)) == 2
    # in the third, [1, 23], in the fourth, [2, 33]: of the first scale's they share less still
    assert proposals((0, 0, 0), (2, 0, 0), (3, 0, 0)) == 3


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
