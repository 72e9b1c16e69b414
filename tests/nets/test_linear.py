"""A linear layer, whichever of torch's libraries it takes, against the same product in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairref import nets
from fairref.nets import IMAGES, LEAST_ROWS, Linear

EPS = torch.finfo(torch.float32).eps


class Names(TorchDispatchMode):
    """The operators that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return Linear(40, 24, bias=bias, dtype=dtype)


def is_convolved(net, x):
    with Names() as seen, torch.no_grad():
        net(x)
    return "convolution" in seen.names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(LEAST_ROWS,), (2, 160), (3, 4, 48), (8, 77), (3, 17), (5, 61)])
def test_it_is_the_product(shape, bias):
    """Values and gradients; rounding grows at most with the length of the sums."""
    net = layer(bias)
    x = torch.randn(*shape, 40, requires_grad=True)
    g = torch.randn(*shape, 24)
    found = [net(x), *torch.autograd.grad(net(x), (x, *net.parameters()), g)]
    leaves = [y.detach().double().requires_grad_() for y in (x, *net.parameters())]
    wanted = torch.nn.functional.linear(*leaves)
    wanted = [wanted, *torch.autograd.grad(wanted, leaves, g.double())]
    sizes = [leaf.detach().abs() for leaf in leaves]  # of the same sums without their signs
    rows, G = sizes[0].reshape(-1, 40), g.double().abs().reshape(-1, 24)
    largest = [torch.nn.functional.linear(*sizes), G @ sizes[1], G.T @ rows, G.sum(0)]
    for y, exact, size, terms in zip(found, wanted, largest, (41, 24, len(G), len(G)), strict=False):
        assert y.shape == exact.shape
        assert ((y - exact).abs().reshape(size.shape) <= terms * EPS * size).all()


def test_many_rows_of_float32_on_a_cpu_are_convolved(monkeypatch):
    net = layer()
    assert is_convolved(net, torch.randn(LEAST_ROWS, 40))
    assert is_convolved(net, torch.randn(40, 3 * LEAST_ROWS).T.reshape(3, -1, 40))  # whatever its strides
    assert not is_convolved(net, torch.randn(LEAST_ROWS - IMAGES, 40))
    assert not is_convolved(net, torch.randn(LEAST_ROWS + 1, 40))
    assert not is_convolved(layer(dtype=torch.float64), torch.randn(LEAST_ROWS, 40).double())
    assert not is_convolved(layer().to("meta"), torch.randn(LEAST_ROWS, 40, device="meta"))
    monkeypatch.setattr(nets, "ONEDNN", False)
    assert not is_convolved(net, torch.randn(LEAST_ROWS, 40))


def test_the_weights_are_those_of_torchs_layer():
    net, theirs = layer(), torch.nn.Linear(40, 24)
    theirs.load_state_dict(net.state_dict())
    x = torch.randn(7, 40)
    assert torch.equal(net(x), theirs(x))
