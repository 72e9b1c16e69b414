"""What the threshold asks of whole batches, and its two kinds."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import binom, multinomial

from fairref.fairness.losses import align_loss, confident_targets, leaving_targets
from fairref.fairness.threshold import asked_to_change, pull_left, quiet_counts

HALF, QUARTER = torch.tensor([0.5, 0.5]).double(), torch.full((4,), 0.25).double()


@pytest.mark.parametrize(("C", "low", "high"), [(0.8, 10, 14), (0.7, 11, 13), (0.58, 12, 12), (0.9, 9, 15)])
def test_of_two_classes_the_counts_near_half_ask_nobody(C, low, high):
    assert quiet_counts(0, 24, HALF, C) == quiet_counts(1, 24, HALF, C) == (low, high)
    for m in range(25):
        moves = asked_to_change((m, 24 - m), HALF, C)
        # by the tails of the binomial: rank r of class 0 is told class 0 where P(n_0 >= r) >= C
        sure = int((binom.sf(np.arange(24), 24, 0.5) >= C).sum())
        assert moves.tolist() == [[0, max(sure - (24 - m), 0)], [max(sure - m, 0), 0]]


@pytest.mark.parametrize("K", [2, 3])
def test_where_a_class_has_everything_all_others_are_told_it(K):
    target = torch.eye(K)[0].double()
    assert quiet_counts(0, 12, target, 0.8) == (12, 12) and (
        K > 2 or quiet_counts(1, 12, target, 0.8) == (0, 0)
    )
    moves = asked_to_change((6, *[6 // (K - 1)] * (K - 1)), target, 0.8)
    assert moves[1:, 0].sum() == moves.sum() == 6


def test_four_classes_ask_for_nothing_over_a_wide_range_unless_the_threshold_is_on_leaving():
    """N = 32, C = .8, one class against three even ones: docs/method.md §3."""
    low, high = quiet_counts(0, 32, QUARTER, 0.8)
    assert low <= 4 and high >= 13
    low, high = quiet_counts(0, 32, QUARTER, 0.8, leave=True)
    assert low <= 8 <= high <= 10  # the chance to leave a class of 11 is .8 for those that leave first
    assert quiet_counts(0, 5, HALF, 0.5) == (3, 3) and quiet_counts(1, 5, HALF, 0.5) == (2, 2)


def test_who_is_asked_of_four_classes_is_what_each_count_vector_says():
    """q of 32 images by an assignment of each drawn count vector's own, without neighbours' help."""
    counts, C = (20, 6, 4, 2), 0.6
    own = np.repeat(np.arange(4), counts)
    logits = np.random.default_rng(0).normal(size=(32, 4)) + 6.0 * np.eye(4)[own]
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    cost = np.linalg.norm(p[:, None] - np.eye(4), axis=2)
    vectors = [n for n in np.ndindex(33, 33, 33) if sum(n) <= 32]
    vectors = [(*n, 32 - sum(n)) for n in vectors]
    weights = multinomial.pmf(vectors, 32, [0.25] * 4)
    q, left = np.zeros((32, 4)), 0.0
    for n, weight in zip(vectors, weights, strict=True):
        if weight < 1e-5:  # what all of them could add is counted
            left += weight
            continue
        slots = np.repeat(np.arange(4), n)
        q[np.arange(32), slots[linear_sum_assignment(cost[:, slots])[1]]] += weight
    clear = np.abs(q.max(1) - C) > left
    told = q.max(1) >= C
    assert clear.all() and left < 0.05
    expected = np.zeros((4, 4), int)
    np.add.at(expected, (own[told], q.argmax(1)[told]), 1)
    np.fill_diagonal(expected, 0)
    assert asked_to_change(counts, QUARTER, C).tolist() == expected.tolist() and expected.sum() > 5


@pytest.mark.parametrize(("C", "left"), [(0.8, 0.405), (0.7, 0.678), (0.58, 1.0), (0.3, 1.0)])
def test_what_is_left_of_the_pull_is_the_slope_over_the_share(C, left):
    """By going through all counts m of a batch of 24."""
    m = np.arange(25)
    moves = [asked_to_change((k, 24 - k), HALF, C) for k in m]  # k of class 0
    net = np.array([int(x[1, 0] - x[0, 1]) for x in moves])  # to class 0, less from it
    slope = (binom.pmf(m, 24, 0.5) * (2 * m - 24) * 2 * net).sum()  # d/dd of the mean, at one half
    assert pull_left(24, C) == pytest.approx(-slope / 24, abs=1e-12)
    assert pull_left(24, C) == pytest.approx(left, abs=5e-4)


@pytest.mark.parametrize("C", [0.6, 0.8, 0.95])
def test_in_large_batches_twice_one_minus_C_is_left(C):
    assert all(abs(pull_left(N, C) - 2 * (1 - C)) < 2 / N**0.5 for N in (100, 1001, 10_000))


def test_the_threshold_on_leaving_tells_the_likeliest_other_class():
    q = torch.tensor(
        [[0.1, 0.5, 0.4], [0.3, 0.4, 0.3], [0.9, 0.1, 0.0], [0.0, 0.3, 0.7], [0, 0, 0], [0.2, 0.4, 0.4]]
    ).double()
    own = torch.tensor([0, 0, 0, 1, 0, 0])
    leaving = leaving_targets(q, own, 0.8)
    expected = q.clone()
    expected[[0, 5]] = torch.tensor([[0.0, 0.9, 0], [0, 0.8, 0]]).double()  # of equals the first
    torch.testing.assert_close(leaving, expected)
    y, confident = confident_targets(leaving, 0.8)
    assert confident.tolist() == [True, False, True, False, False, True] and (y[0], y[2]) == (1, 0)
    assert torch.equal(leaving_targets(q, own, 0.0)[4], q[4])  # no face, no target


@pytest.mark.parametrize("C", [0.55, 0.8])
def test_with_two_classes_both_thresholds_are_the_same(C):
    q = torch.linspace(0, 1, 41).double()
    q = torch.stack([q, 1 - q], 1)
    for own in (torch.zeros(41).long(), torch.ones(41).long()):
        (y, told), (of_leaving, told_leaving) = (
            confident_targets(of, C) for of in (q, leaving_targets(q, own, C))
        )
        assert torch.equal(told, told_leaving) and torch.equal(y[told], of_leaving[told])


def test_soft_targets_are_the_cross_entropy_with_q_of_all_images():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    q = torch.rand(5, 3, dtype=torch.float64, generator=generator)
    q = q / q.sum(1, keepdim=True)
    q[3] = 0
    values, told = align_loss(logits, q, 0.8, 10, soft=True)
    torch.testing.assert_close(values, -(q * logits.log_softmax(1)).sum(1) / 10)
    assert told.tolist() == [True, True, True, False, True]
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    expected = (logits.softmax(1) - q) * told[:, None] / 10
    torch.testing.assert_close(gradient, expected.detach())
