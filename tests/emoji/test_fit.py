"""A training stage that was interrupted ends as one that was not, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fairref.emoji.fit import fit, generator_for, learning_rate

STEPS, SAVE_EVERY = 23, 5
SETTINGS = {"steps": STEPS, "lr": 1e-2, "seed": 3, "ema": 0.9, "save_every": SAVE_EVERY}


class Tiny(nn.Module):
    """Batch norm, for buffers of floats and of integers, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


def tiny(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny()


class Loss:
    """Error of the sum of x (B, 3). Remembers the weights it saw; call `stop` of 0, 1, .. is a Ctrl-C."""

    def __init__(self, stop=None):
        self.stop, self.seen = stop, []

    def __call__(self, network, generator):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append({k: v.clone() for k, v in network.state_dict().items()})
        x = torch.randn(16, 3, generator=generator)
        return F.mse_loss(network(x), x.sum(1, keepdim=True))


def flat(state, path=""):
    """{path: leaf} of nested dicts and lists."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, value in items for k, v in flat(value, f"{path}/{key}").items()}
    return {path: state}


def assert_same(a, b):
    a, b = flat(dict(a)), flat(dict(b))
    assert a.keys() == b.keys()
    different = [
        k for k in a if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])
    ]
    assert not different


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted fit: folder, network, loss."""
    folder, loss = tmp_path_factory.mktemp("whole"), Loss()
    return folder, fit("stage", tiny(), loss, folder=folder, **SETTINGS), loss


@pytest.mark.parametrize("stops", [(7,), (5,), (STEPS - 1,), (12, 6)])
def test_a_resumed_fit_is_an_uninterrupted_one(whole, tmp_path, stops):
    for i, stop in enumerate(stops):
        with pytest.raises(KeyboardInterrupt):
            fit("stage", tiny(seed=i), Loss(stop), folder=tmp_path, **SETTINGS)
    loss = Loss()
    resumed = fit("stage", tiny(seed=9), loss, folder=tmp_path, **SETTINGS)  # all it needs is in the folder
    folder, network, whole_loss = whole
    assert_same(resumed.state_dict(), network.state_dict())
    assert_same(*(torch.load(f / "stage.pt", weights_only=True) for f in (tmp_path, folder)))
    assert 0 < len(loss.seen) < STEPS
    for mine, other in zip(loss.seen, whole_loss.seen[-len(loss.seen) :], strict=True):
        assert_same(mine, other)


def test_stopped_before_its_first_file_it_starts_anew(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit("stage", tiny(), Loss(SAVE_EVERY - 1), folder=tmp_path, **SETTINGS)
    assert not list(tmp_path.iterdir())
    assert_same(fit("stage", tiny(), Loss(), folder=tmp_path, **SETTINGS).state_dict(), whole[1].state_dict())


def test_a_finished_stage_is_read_not_trained(whole):
    folder, network, _ = whole
    again = fit("stage", tiny(seed=9), Loss(stop=0), folder=folder, **SETTINGS)
    assert_same(again.state_dict(), network.state_dict())
    assert not network.training and not again.training


def test_the_moving_average_is_the_sum_it_stands_for(whole):
    folder, network, loss = whole
    last = torch.load(folder / "stage.pt", weights_only=True)["network"]
    weights = [*loss.seen, last]  # before the first step, then after each
    for name in ("first.weight", "norm.running_var"):
        expected = weights[0][name].double()
        for i, after in enumerate(weights[1:], 1):
            decay = min(0.9, i / (i + 9))
            expected = decay * expected + (1 - decay) * after[name].double()
        torch.testing.assert_close(network.state_dict()[name].double(), expected, rtol=1e-5, atol=1e-6)
    assert network.norm.num_batches_tracked == STEPS
    plain = fit("plain", tiny(), Loss(), folder=folder, **{**SETTINGS, "ema": 0.0})
    assert_same(plain.state_dict(), torch.load(folder / "plain.pt", weights_only=True)["network"])


def test_it_learns(tmp_path):
    def loss_of(network, generator):
        x = torch.randn(32, 3, generator=generator)
        return F.mse_loss(network(x), x @ truth)

    truth, network = torch.tensor([[1.0], [-2.0], [0.5]]), nn.Linear(3, 1)
    fitted = fit("line", network, loss_of, steps=300, lr=0.1, folder=tmp_path, weight_decay=0.0)
    torch.testing.assert_close(fitted.weight, truth.T, rtol=0, atol=1e-2)


def test_learning_rate_is_torchs_cosine_after_a_linear_rise():
    peak, steps, warmup = 0.3, 400, 50
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=0.02 * peak)
    for step in range(warmup):
        assert learning_rate(step, steps, peak, warmup) == pytest.approx(peak * (step + 1) / warmup)
    for step in range(warmup, steps):
        assert learning_rate(step, steps, peak, warmup) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()


def test_every_step_of_every_stage_has_its_own_randomness():
    def draw(*key):
        return tuple(torch.randn(4, generator=generator_for(*key)).tolist())

    keys = [(seed, stage, step) for seed in (0, 1) for stage in ("vae", "unet") for step in range(50)]
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(0, "vae", 7) == draw(0, "vae", 7)


def test_no_two_steps_of_the_small_worlds_training_draw_the_same():
    """32 bits are few for so many keys, so this looks at them: each stage's seed, and more steps than it has."""
    stages = {
        0: [
            *("vae", "unet", "unet_polish", "clip", "tokenizer", "scale", "threshold", "check"),
            *("pool first", "pool second"),
        ],
        2: ["classifier_finetune"],
        3: ["classifier_evaluate"],
        4: ["detector_pnet", "detector_rnet", "detector_onet"],
        5: ["embedder", "faces"],
        6: ["dino"],
    }
    keys = [(seed, name, step) for seed, names in stages.items() for name in names for step in range(5000)]
    assert len({generator_for(*key).initial_seed() for key in keys}) == len(keys)
