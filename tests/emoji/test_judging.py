"""What the small world's judges are taught: faces where they are, and windows that are or aren't one."""

import pytest
import torch

from fairref.emoji import build, check, judging, stages
from fairref.emoji.pictures import STYLES, VIEWS, draw, face_points
from fairref.fairness.faces import MTCNNDetector, area, square_around
from fairref.files.weights import read
from fairref.judges import mtcnn
from fairref.judges.sprites import RESOLUTION


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_true_faces_are_the_people_shown():
    scene = stages.balanced_scene(64, seeded(1))
    faces = judging.true_faces(scene)
    boxes, landmarks = face_points(scene.person)
    assert torch.equal(faces.has_face, scene.shown) and not faces.has_face.all()
    assert torch.equal(faces.boxes, square_around(boxes)[scene.shown])
    assert torch.equal(faces.landmarks, landmarks[scene.shown])
    moved = judging.true_faces(scene, seeded(2), 0.05)
    off = (moved.boxes - faces.boxes).abs().amax(1) / (faces.boxes[:, 2] - faces.boxes[:, 0])
    assert 0.01 < off.mean() < 0.1


def test_labels_are_absent_where_they_cannot_be_seen():
    scene = stages.balanced_scene(512, seeded(3))
    told = stages.labels(scene)
    nobody = scene.view == VIEWS.index("nobody")
    assert all((values[nobody] == -1).all() for values in told.values())
    assert torch.equal(told["gender"][~nobody], scene.person.gender[~nobody])
    grey = scene.style == STYLES.index("grey")
    assert (told["skin_tone"][grey] == -1).all() and (
        told["skin_tone"][~grey & ~nobody] >= 0
    ).float().mean() > 0.8
    assert set(told["age"].unique().tolist()) == {-1, 0, 1}


def test_overlap_against_counted_pixels():
    boxes = torch.tensor([[0, 0, 10, 10], [5, 5, 15, 15], [20, 20, 24, 24]], dtype=torch.float)

    def pixels(box):
        return {(x, y) for x in range(int(box[0]), int(box[2])) for y in range(int(box[1]), int(box[3]))}

    found = judging.overlap(boxes, boxes)
    for i, a in enumerate(map(pixels, boxes)):
        for j, b in enumerate(map(pixels, boxes)):
            assert found[i, j].item() == pytest.approx(len(a & b) / len(a | b))


def test_windows_are_of_every_kind():
    scene = stages.balanced_scene(48, seeded(4))
    kinds = {"face": 0, "part": 0, "none": 0}
    for (truth, points), view in zip(judging.all_faces(scene), scene.view.tolist(), strict=True):
        assert len(truth) == len(points) == {"nobody": 0, "pair": 2}.get(VIEWS[view], 1)
        boxes = judging.some_windows(truth, seeded(5))
        share = judging.overlap(boxes, truth).amax(1) if len(truth) else torch.zeros(len(boxes))
        kinds["face"] += int((share >= judging.POSITIVE).sum())
        kinds["part"] += int(((share >= judging.PART) & (share < judging.POSITIVE)).sum())
        kinds["none"] += int((share < judging.NEGATIVE).sum())
    assert min(kinds.values()) > 0.1 * sum(kinds.values())


class Perfect(torch.nn.Module):
    """Answers as the loss asks for it, in the form of the third network."""

    def __init__(self, boxes, truth, share):
        super().__init__()
        size = (boxes[:, 2:] - boxes[:, :2] + 1).repeat(1, 2)
        self.moves = (truth[0] - boxes) / size
        points = (truth[1] + 1 - boxes[:, None, :2]) / size[:, None, :2]
        self.points = torch.cat([points[..., 0], points[..., 1]], 1)
        self.probability = (share >= judging.POSITIVE).float()

    def forward(self, x):
        return self.moves, self.points, self.probability


def test_what_the_detector_is_asked_for_is_what_it_reads_back():
    """A network that answers the loss perfectly makes MTCNN find the boxes and landmarks that were meant."""
    scene = stages.balanced_scene(16, seeded(6))
    scene = scene[(scene.view == 0).nonzero()[:, 0]]
    boxes, landmarks = face_points(scene.person)
    detector = mtcnn.MTCNN(10)
    for b, (truth, points) in enumerate(judging.all_faces(scene)):
        seen = judging.some_windows(truth, seeded(7))
        x = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
        _, seen, image = mtcnn.crops(x, mtcnn.square(seen), torch.zeros(len(seen), dtype=torch.long), 48)
        share = judging.overlap(seen, truth)[:, 0]
        truths = truth.expand(len(seen), 4), points.expand(len(seen), 5, 2)
        perfect = Perfect(seen, truths, share)
        loss = judging.detector_loss(perfect, torch.zeros(len(seen), 1), seen, truths, share)
        assert loss.item() < 1e-4
        detector.onet = perfect
        found = mtcnn.Detections(*detector.settle(x, seen, image)[0])
        (one,) = MTCNNDetector(lambda x, found=found: [found])(x)
        torch.testing.assert_close(one.boxes[0], boxes[b], rtol=0, atol=1e-3)
        torch.testing.assert_close(one.landmarks[0], landmarks[b], rtol=0, atol=1e-3)


def test_closer_faces_lie_inside():
    scene = stages.balanced_scene(64, seeded(8), portraits=True)
    faces = judging.true_faces(scene)
    near = torch.arange(64) % 2 == 0
    close = judging.closer(faces, seeded(9), near)
    assert torch.equal(close.boxes[~near], faces.boxes[~near])
    share = area(close.boxes[near]) / area(faces.boxes[near])
    assert share.min() > 0.05 and share.max() < 0.35


def test_nobody_is_nobody():
    x = draw(check.nobody_scene(32, seeded(10)))
    assert x.shape == (32, 3, RESOLUTION, RESOLUTION)
    plain = x[1::2]  # a background alone has no edges
    assert (plain[..., 1:] - plain[..., :-1]).abs().max() < 0.05


def test_weights_that_are_split_otherwise_leave_nothing_behind(tmp_path):
    path = tmp_path / "model.safetensors"
    for limit, files in ((100, 5), (200, 3), (10**6, 1), (100, 5)):
        network = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        build.save_half(network, path, limit)
        assert len(list(tmp_path.iterdir())) == files
        found = read(path)
        assert all(torch.equal(found[key], value.half()) for key, value in network.state_dict().items())


@pytest.mark.slow
def test_every_stage_trains_and_the_bundle_loads(tmp_path, monkeypatch):
    from functools import partial

    from fairref.bundle.loading import load_bundle

    for name in ("train_vae", "train_clip", "train_unet", "polish_unet"):
        monkeypatch.setattr(stages, name, partial(getattr(stages, name), steps=2))
    monkeypatch.setattr(stages, "make_pool", partial(stages.make_pool, count=128))
    for name in ("train_detector", "train_embedder", "train_dino"):
        monkeypatch.setattr(judging, name, partial(getattr(judging, name), steps=2))
    monkeypatch.setattr(judging, "CLASSIFIER_STEPS", {"finetune": 2, "evaluate": 2})
    networks = build.train(tmp_path)
    build.export(networks, tmp_path, tmp_path / "bundle")
    bundle = load_bundle(tmp_path / "bundle")
    assert set(bundle.attributes) == {"gender", "skin_tone", "age"}
    assert bundle.face_features.shape == (judging.FACES, judging.EMBEDDER_CONFIG["features"])
    assert all(not gate.holds for gate in check.networks_gates(bundle, 32)[:1])  # two steps are not enough
