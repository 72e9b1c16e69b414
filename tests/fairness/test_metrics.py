"""bias(P), its noise floor and its helpers."""

import itertools
import math

import numpy as np
import pytest
import torch

from fairref.fairness.metrics import (
    bias,
    blends,
    joint_counts,
    mean_cosine,
    noise_floor,
)


def literal_bias(freq):
    K = len(freq)
    return sum(abs(freq[i] - freq[j]) for i, j in itertools.combinations(range(K), 2)) / (K * (K - 1) / 2)


@pytest.mark.parametrize("K", [2, 3, 4, 8])
def test_bias_is_the_mean_difference_of_all_pairs(K):
    counts = np.random.default_rng(K).integers(0, 50, (5, K))
    values = bias(counts)
    assert values.shape == (5,)
    for n, value in zip(counts, values, strict=True):
        assert value == pytest.approx(literal_bias(n / n.sum()), rel=1e-12)
        assert bias(n / n.sum()) == pytest.approx(value, rel=1e-12)


def test_bias_of_equal_shares_and_its_maxima():
    for K, largest in ((2, 1), (4, 1 / 2), (8, 1 / 4)):
        assert bias(np.full(K, 20)) == 0
        assert bias(np.eye(K)[1] * 160) == pytest.approx(largest)
    assert bias([50, 10]) == pytest.approx(40 / 60)


def test_a_bias_of_nothing_is_refused():
    with pytest.raises(ValueError, match="one image"):
        bias([0, 0])
    with pytest.raises(ValueError, match="one image"):
        bias([[1, 2], [0, 0]])
    with pytest.raises(ValueError, match="two classes"):
        bias([3])


@pytest.mark.parametrize(
    ("K", "n", "mean", "std"), [(2, 60, 0.10, 0.08), (4, 160, 0.045, 0.02), (8, 160, 0.03, 0.01)]
)
def test_the_noise_floor_is_the_published_one(K, n, mean, std):
    found = noise_floor(K, n)
    assert found == pytest.approx((mean, std), abs=0.005)
    assert found == noise_floor(K, n)


def test_the_noise_floor_for_small_n_is_the_sum_over_all_outcomes():
    for K, n in ((2, 5), (3, 4)):
        values = [
            literal_bias(np.bincount(labels, minlength=K) / n)
            for labels in itertools.product(range(K), repeat=n)
        ]
        exact = (np.mean(values), np.std(values))
        assert noise_floor(K, n) == pytest.approx(exact, abs=1e-12 if K == 2 else 3e-3)


def test_the_noise_floor_of_a_target_is_that_of_a_model_that_meets_it():
    rng = np.random.default_rng(1)
    for target in ([0.75, 0.25], [0.5, 0.2, 0.3]):
        draws = rng.multinomial(60, target, 20_000) / 60
        pairs = [
            np.abs((draws - target)[:, i] - (draws - target)[:, j])
            for j in range(len(target))
            for i in range(j)
        ]
        values = np.mean(pairs, 0)
        assert noise_floor(len(target), 60, target=np.array(target)) == pytest.approx(
            (values.mean(), values.std()), abs=2e-3
        )
    assert noise_floor(2, 30, target=np.array([1.0, 0.0])) == (0, 0)
    assert noise_floor(3, 30, target=np.full(3, 1 / 3)) == pytest.approx(noise_floor(3, 30), abs=1e-12)


def test_the_noise_floor_mean_is_the_folded_binomials():
    """E|2X - n|/n for X ~ Binomial(n, ½), n even, is C(n, n/2) / 2^n."""
    assert noise_floor(2, 60)[0] == pytest.approx(math.comb(60, 30) / 2**60, rel=1e-12)


def test_joint_counts():
    assert joint_counts([torch.tensor([2, 0, 2, 2])], (4,)).tolist() == [1, 0, 3, 0]
    assert joint_counts([torch.tensor([], dtype=torch.long)] * 2, (2, 3)).tolist() == [[0] * 3] * 2
    counts = joint_counts([torch.tensor([0, 1, 1, 1]), torch.tensor([2, 0, 2, 2])], (2, 3))
    assert counts.tolist() == [[0, 0, 1], [1, 0, 2]]


def test_mean_cosine_with_one_and_with_many():
    a = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    assert mean_cosine(a, torch.tensor([[5.0, 0.0]])) == pytest.approx((1 + 0 + 2**-0.5) / 3)
    assert mean_cosine(a, a) == pytest.approx(1)
    assert mean_cosine(a, -a) == pytest.approx(-1)


def test_blends_are_images_below_four_fifths():
    p = torch.tensor([[0.79, 0.21], [0.81, 0.19], [0.1, 0.9], [0.5, 0.5]])
    assert blends([p.log()]) == 2
    other = torch.tensor([[0.9, 0.1]] * 3 + [[0.6, 0.4]])
    assert blends([other.log()]) == 1 and blends([p.log(), other.log()]) == 2
    assert blends([p.log(), other.flip(0).log()]) == 2 and blends([p.flip(0).log(), other.flip(0).log()]) == 2
