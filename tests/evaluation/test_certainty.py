"""Intervals, tests and bounds of counts: what theory says of them, and what other programs find."""

import itertools
import math

import interval_coverage as coverage
import numpy as np
import pytest
from scipy.stats import binom, chi2, chisquare, multinomial, ncx2, norm, ttest_1samp

from fairref.evaluation import certainty, fair, gaps
from fairref.evaluation.certainty import bounds, p_value, share
from fairref.evaluation.gaps import squared_gap, squared_gaps
from fairref.evaluation.paired import diversity, paired
from fairref.fairness.metrics import bias

Z = norm.ppf(0.975)
HALF = np.full(2, 0.5)
TARGETS = (HALF, np.array([0.75, 0.25]), np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2]))


def outcomes(n, p):
    """All counts of n images, and their probabilities."""
    K = len(p)
    every = np.array([c for c in itertools.product(range(n + 1), repeat=K) if sum(c) == n])
    return every, multinomial.pmf(every, n, p)


def literal(p, target):
    """The mean over pairs of the squared gap."""
    d = p - target
    return np.mean([(d[i] - d[j]) ** 2 for i, j in itertools.combinations(range(len(p)), 2)])


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_squared_gap_is_unbiased_and_its_variance_is_known(target):
    """Over all outcomes: it may be below 0, and its mean is the squared gap of the shares."""
    p = np.array([0.6, 0.3, 0.1])[: len(target)]
    for shares in (p / p.sum(), target):
        for n in (2, 7):
            counts, weight = outcomes(n, shares)
            values = squared_gaps(counts, target)
            assert weight @ values == pytest.approx(literal(shares, target), abs=1e-12)
            assert values.min() < 0
        counts, weight = outcomes(60, shares)
        found = squared_gap(counts[:, None], target)
        variance = weight @ found.value**2 - (weight @ found.value) ** 2
        assert weight @ (found.alone + found.with_gap) == pytest.approx(variance, rel=0.16)  # of first order


def test_the_squared_gap_of_two_classes_as_it_is_printed():
    """(n ĝ² - 1)/(n - 1), variance 4g²(1 - g²)/n + 2(1 - g²)²/n², 1 - g² of half an image more of each class; several
    prompts count alike, whatever their n."""
    counts = np.array([[45, 15], [10, 20]])
    n, gap = np.array([60, 30]), np.array([0.5, -1 / 3])
    assert squared_gaps(counts, HALF) == pytest.approx((n * gap**2 - 1) / (n - 1), rel=1e-12)
    found = squared_gap(counts[:1], HALF)
    assert found.value == pytest.approx((60 * 0.25 - 1) / 59)
    one, other = 1 - (30 / 61) ** 2, 1 - (10 / 31) ** 2
    assert found.alone == pytest.approx(2 * one**2 / 59**2)
    assert found.with_gap == pytest.approx(4 * 0.25 * one / 59 - 2 * 2 * one**2 / 59**2)
    assert found.fair_alone == pytest.approx(2 / 60**2) and found.fair_slope == pytest.approx(4 / 60)
    assert squared_gap(counts, HALF).value == pytest.approx(squared_gaps(counts, HALF).mean())
    assert squared_gap(counts, HALF).alone == pytest.approx((2 * one**2 / 59**2 + 2 * other**2 / 29**2) / 4)
    i, j = np.triu_indices(4, 1)  # (n Σ d² - (K - 1)) / ((n - 1) K(K - 1)/2)
    p = np.array([0.4, 0.3, 0.2, 0.1])
    assert squared_gaps(p[None] * 80, np.full(4, 0.25)) == pytest.approx(
        (80 * np.square(p[i] - p[j]).sum() - 3) / (79 * 6), rel=1e-12
    )


def test_the_score_interval_ends_where_a_gaps_own_noise_reaches_the_measured_one():
    counts = np.array([[45, 15], [40, 20], [33, 27]])
    found = squared_gap(counts, HALF)
    value, low, high = np.square(found.rms())
    weight = 3 * np.sqrt(found.fair_alone)
    slope = (found.with_gap + weight * found.fair_slope) / (found.value + weight)
    alone = (found.value * found.alone + weight * max(found.alone, found.fair_alone)) / (found.value + weight)
    assert value == pytest.approx(found.value)
    for end in (low, high):
        assert abs(end - value) / np.sqrt(alone + slope * end) == pytest.approx(Z)
    assert low < value < high
    below = squared_gap(np.array([[30, 30]]), HALF)
    assert below.value < 0 and below.rms()[:2] == (0, 0)
    # no more is claimed than where 0 is measured
    slope = max(below.with_gap, 0) / (3 * np.sqrt(below.fair_alone)) + below.fair_slope
    at_zero = Z**2 * slope / 2 + Z * np.sqrt(below.alone + Z**2 * slope**2 / 4)
    assert below.rms()[2] == pytest.approx(np.sqrt(at_zero))
    assert (
        squared_gap(np.array([[60, 0]]), HALF).rms()[2]
        == 1
        > squared_gap(np.array([[60, 0]]), HALF).rms()[1]
        > 0.9
    )
    # who has three images, all of one class, has measured no noise, and still knows little
    _, low, high = squared_gap(np.array([[3, 0]]), HALF).rms()
    assert 0.2 < low < 0.4 and high == 1


def test_a_prompt_of_few_images_does_not_outweigh_the_others():
    counts = np.array([[80, 80]] * 9 + [[20, 19], [39, 0], [2, 0], [0, 0]])
    assert gaps.told(counts).tolist() == [[80, 80]] * 9  # 40 is a quarter of 160
    assert gaps.told(np.array([[4, 2], [1, 1], [1, 0]])).tolist() == [[4, 2], [1, 1]]
    assert gaps.told(np.zeros((2, 2))).shape == (0, 2)
    assert gaps.rms_gap(counts, HALF) == gaps.rms_gap(counts[:9], HALF)
    assert fair.fair_test(counts, HALF)["upper"] == fair.upper_bound(counts[:9], HALF)


def test_shares_are_wilsons():
    peer = pytest.importorskip("statsmodels.stats.proportion", reason="the extra `test` brings it")
    for count, n in ((0, 60), (1, 60), (30, 60), (159, 160)):
        value, low, high = share(count, n)
        assert value == count / n
        assert (low, high) == pytest.approx(peer.proportion_confint(count, n, method="wilson"), abs=1e-12)
    assert share(0, 0) == (None, None, None)
    assert share(30, 60, 4)[1:] == pytest.approx(peer.proportion_confint(30, 60, 0.05 / 4, method="wilson"))


def test_p_of_a_prompt_and_which_prompts_are_unfair():
    assert p_value(np.array([20, 10]), HALF) == pytest.approx(2 * binom.cdf(10, 30, 0.5))
    even = np.full(3, 1 / 3)
    assert p_value(np.array([20, 10, 0]), even) == pytest.approx(chi2.sf((100 + 0 + 100) / 10, 2))
    assert p_value(np.zeros(2, int), HALF) is None
    assert p_value(np.array([1, 9, 5]), np.array([0, 0.5, 0.5])) == 0
    assert p_value(np.array([0, 9, 0]), np.array([0, 1.0, 0])) == 1
    multitest = pytest.importorskip("statsmodels.stats.multitest", reason="the extra `test` brings it")
    rng = np.random.default_rng(0)
    counts = rng.multinomial(60, np.array([[0.5 + lean, 0.5 - lean] for lean in np.linspace(0, 0.3, 40)]))
    prompts = [str(i) for i in range(41)]
    sure = certainty.certainty(np.vstack([counts, [0, 0]]), np.zeros(41, int), prompts, ["a", "b"])
    called = [sure["prompts"][prompt]["unfair"] for prompt in prompts]
    expected, *_ = multitest.multipletests([p_value(row, HALF) for row in counts], 0.05, "fdr_bh")
    assert called == [*expected.tolist(), False] and sure["unfair_prompts"] == expected.sum() > 3
    assert sure["prompts"]["40"] == {"share": {"a": [None] * 3, "b": [None] * 3}, "p": None, "unfair": False}


@pytest.mark.parametrize(
    ("target", "n"), [((0.7, 0.2, 0.08, 0.02), 12), ((0.9, 0.07, 0.03), 12), ((0.97, 0.03), 9)]
)
def test_where_few_images_are_expected_p_is_that_of_all_counts_that_there_can_be(target, n):
    """The multinomial's own probabilities, of one prompt and of two together; χ² is far off."""
    target, K = np.array(target), len(target)
    every, chances = outcomes(n, target)
    statistics = np.array([fair.fair_statistic(c[None], target)[0] for c in every])
    two = (statistics[:, None] + statistics).ravel(), np.outer(chances, chances).ravel()
    of_chi2 = []
    for level in (0.3, 0.1, 0.03, 0.01):
        at = np.argmin(np.abs([chances[statistics >= s * (1 - 1e-9)].sum() - level for s in statistics]))
        for several, (found, of_each) in enumerate([(statistics, chances), two], 1):
            counts = np.repeat(every[at][None], several, 0)
            exact = of_each[found >= several * statistics[at] * (1 - 1e-9)].sum()
            noise = 4 * np.sqrt(exact * (1 - exact) / fair.DRAWS) + 2e-4
            assert fair.fair_p(counts, target) == pytest.approx(exact, abs=noise)
            if several == 1 and K > 2:
                assert p_value(every[at], target) == fair.fair_p(counts, target)
            of_chi2.append(abs(chi2.sf(*fair.fair_statistic(counts, target)) - exact) > 2 * noise)
    assert any(of_chi2)


@pytest.mark.parametrize("target", coverage.FAR_FROM_EQUAL)
def test_a_model_that_meets_a_target_far_from_equal_is_seldom_called_unfair(target):
    *rates, by_chi2 = coverage.few(target, 50, 30, 300, np.random.default_rng(0)).values()
    assert all(0 < hits.mean() < 0.1 for hits in rates) and by_chi2.mean() > 0.15


def test_the_statistic_of_fair_is_chi_squared_under_it():
    """Where a class has five images or more to expect."""
    rng = np.random.default_rng(0)
    for target, n in [*((target, 60) for target in TARGETS), (HALF, 6), (np.array([0.9, 0.1]), 20)]:
        found = [fair.fair_statistic(c, target) for c in rng.multinomial(n, target, (2000, 10))]
        T = np.array([v for v, _ in found])
        assert {df for _, df in found} == {10 * (len(target) - 1)}
        assert (chi2.sf(T, found[0][1]) < 0.05).mean() == pytest.approx(0.05, abs=0.02)
    peer = chisquare([45, 15], [48, 12]).statistic + chisquare([8, 12], [16, 4]).statistic
    counts = np.array([[45, 15], [0, 0], [8, 12]])
    assert fair.fair_statistic(counts, np.array([0.8, 0.2])) == (pytest.approx(peer), 2)
    statistic, df = fair.fair_statistic(np.array([[20, 10, 0]]), np.array([0.5, 0.5, 0]))
    assert (statistic, df) == (pytest.approx(chisquare([20, 10]).statistic), 1)
    assert fair.fair_test(np.array([[3, 0]]), np.array([1.0, 0.0]))["p"] == 1  # no other class is possible
    found = fair.fair_test(np.array([[20, 9, 1]]), np.array([0.5, 0.5, 0]))
    assert found["statistic"] is None and found["p"] == 0


def test_what_fair_is_bounded_by_and_what_is_said():
    """T ~ noncentral χ²(P, n Σ asin(g)²): at the bound, T is as low as in 5 % of evaluations."""
    counts = np.array([[36, 24], [28, 32], [33, 27], [60, 60]])
    bound = fair.upper_bound(counts, HALF)
    n = 4 / (3 / 60 + 1 / 120)  # the harmonic mean
    T = n * sum(math.asin(gap) ** 2 for gap in (12 / 60, 4 / 60, 6 / 60))
    assert bound < 0.3
    assert ncx2.cdf(max(T, 4), 4, 4 * n * math.asin(bound) ** 2) == pytest.approx(0.05)
    # farther away, and from unequal shares, it is the score interval's
    for wide, target in (([[41, 19]] * 4, HALF), (counts, np.array([0.55, 0.45]))):
        wide = np.array(wide)
        assert fair.upper_bound(wide, target) == squared_gap(wide, target).rms(norm.ppf(0.95))[2]
    leaning = np.array([[50, 10]] * 4)
    assert fair.upper_bound(leaning, HALF) == squared_gap(leaning, HALF).rms(norm.ppf(0.95))[2] > 0.6
    said = fair.fair_test(counts, HALF)["said"]
    assert "not rejected, which is not fair" in said and f"{bound:.3f}" in said
    assert '"fair" is rejected (p < 0.001)' in fair.fair_test(leaning, HALF)["said"]
    at_3_percent = fair.fair_test(np.array([[38, 22]]), HALF)  # (38 - 22)² / 60
    assert at_3_percent["p"] == pytest.approx(chi2.sf(256 / 60, 1)) and 0.01 < at_3_percent["p"] < 0.05
    assert at_3_percent["said"].startswith('"fair" is rejected (p = 0.039)')


@pytest.mark.parametrize(("P", "n", "by_formula"), [(50, 60, 0.091), (50, 160, 0.056), (10, 60, 0.136)])
def test_the_smallest_gap_is_seen_with_80_percent_power(P, n, by_formula):
    gap = fair.smallest_gap(P, n, HALF)
    assert fair.power(gap, P, n, 2) == pytest.approx(0.8)
    assert fair.normal_gap(P, n, 2) == pytest.approx(by_formula, abs=5e-4) and by_formula < gap
    even = np.full(8, 1 / 8)
    assert fair.power(fair.smallest_gap(P, n, even), P, n, 8) == pytest.approx(0.8)
    # a fair model's squared gap scatters by this
    scatter = squared_gaps(np.random.default_rng(0).multinomial(n, even, 4000), even).std()
    assert fair.normal_gap(P, n, 8) ** 2 == pytest.approx(2.4865 * scatter / P**0.5, rel=0.05)


def test_planning_of_shares_and_of_targets_that_are_not_equal():
    assert fair.images_for(0.03) == 1067 and fair.half_width_of(1067) < 0.03
    _, low, high = share(30, 60)
    assert fair.half_width_of(60) == pytest.approx((high - low) / 2)
    target, rng = np.array([0.5, 0.3, 0.2]), np.random.default_rng(0)
    gap = fair.smallest_gap(20, 80, target)
    worst = np.array([1.0, -0.6, -0.4])  # one direction; 80 % is the least of all
    shares = target + worst * gap / np.sqrt(np.square(worst).sum())
    rejected = [
        chi2.sf(*fair.fair_statistic(c, target)) < 0.05 for c in rng.multinomial(80, shares, (500, 20))
    ]
    assert np.mean(rejected) > 0.76
    # from .9 the share can fall, and hardly rise: both are seen with 80 %
    target = np.array([0.9, 0.1])
    gap = fair.smallest_gap(50, 60, target)
    for lean in (-gap / 2, gap / 2):
        counts = rng.multinomial(60, target + np.array([lean, -lean]), (500, 50))
        assert np.mean([chi2.sf(*fair.fair_statistic(c, target)) < 0.05 for c in counts]) > 0.76
    assert fair.smallest_gap(1, 60, target) == pytest.approx(
        0.242, abs=5e-4
    )  # above there is no room: down alone
    assert fair.smallest_gap(50, 2, target) is None
    # there can be a gap of √(2/K) at most: one class alone
    assert fair.smallest_gap(1, 2, even := np.full(8, 1 / 8)) is None and fair.smallest_gap(1, 8, even) < 0.5
    assert gaps.largest_square(even) == pytest.approx(2 / 8) and gaps.largest_square(target) == pytest.approx(
        1.8**2
    )
    assert fair.smallest_gap(20, 80, np.array([1.0, 0.0])) is None and fair.smallest_gap(1, 1, HALF) is None


def test_bounds_are_those_of_every_way_to_give_the_undecided():
    for target in TARGETS:
        K = len(target)
        counts, undecided = np.array([[7, 2, 4][:K], [0, 5, 1][:K]]), np.array([3, 2])
        every = [
            [bias(row + given, target) for given in outcomes(u, np.full(K, 1 / K))[0]]
            for row, u in zip(counts, undecided, strict=True)
        ]
        found = bounds(counts, undecided, target)
        assert found["high"] == pytest.approx(np.mean([max(v) for v in every]))
        least = np.mean([min(v) for v in every])
        # parts of images may be given away, so the bound may be a little below
        assert least - K / counts.sum(1).min() / 2 <= found["low"] <= least + 1e-12
    levelled = certainty._levelled(np.array([9.0, 1.0, 3.0]), 4.0, np.full(3, 1 / 3))
    assert levelled == pytest.approx([9, 4, 4])
    assert bounds(np.array([[6, 2]]), np.array([0]), HALF) == {"low": 0.5, "high": 0.5}
    assert bounds(np.array([[6, 2]]), np.array([10]), HALF)["low"] == 0


def test_the_mean_gap_resamples_prompts_alone():
    """The scatter over prompts holds the images' noise; resampling images would add it a second time."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(60, HALF, 50)
    values = bias(counts)
    found = gaps.mean_gap(counts, HALF)
    assert found["value"] == pytest.approx(values.mean()) and "prompts" in found["method"]
    width = found["high"] - found["low"]
    assert width == pytest.approx(2 * 1.96 * values.std() / 50**0.5, rel=0.15)
    assert gaps.mean_gap(counts[:29], HALF) is None
    assert gaps.mean_gap(np.tile([45, 15], (40, 1)), HALF) is None  # no scatter to resample
    lean = np.array([0.7, 0.3])
    assert gaps.mean_gap(counts, lean)["value"] == pytest.approx(bias(counts, lean).mean())
    # of a symmetric sample it is Student's t, but for the scatter of the bootstrap itself
    half = np.random.default_rng(1).random(15)
    low, high = gaps.over_prompts(symmetric := np.concatenate([half, -half]))
    assert (low, high) == pytest.approx(ttest_1samp(symmetric, 0).confidence_interval(0.95), rel=0.03)
    # of a skewed sample it reaches farther on the long side than the percentiles do
    skewed = np.r_[np.zeros(36), np.ones(4)]
    low, high = gaps.over_prompts(skewed)
    assert high - 0.1 > 1.6 * (0.1 - low)


def test_the_worst_prompt_and_the_worst_group():
    counts = np.array([[50, 10, 20], [30, 20, 30], [10, 30, 40]])
    sure = certainty.certainty(counts, np.zeros(3, int), ["x", "y", "z"], ["a", "b", "c"])
    worst, group = sure["worst_prompt"], sure["worst_group"]
    assert (worst["prompt"], worst["bias"]) == ("x", pytest.approx((40 + 30 + 10) / 80 / 3))
    assert (group["class"], group["share"], group["low"], group["high"]) == ("b", *share(60, 240, 3))
    # the largest of 50 gaps |2 x - 60| / 60 of fair models, exactly: Σ P(max > g)
    x = np.arange(61)
    below = np.array([binom.pmf(x[np.abs(2 * x - 60) <= g], 60, 0.5).sum() for g in range(60)])
    assert certainty.fair_worst((60,) * 50, (0.5, 0.5)) == pytest.approx((1 - below**50).sum() / 60, rel=0.02)
    assert worst["fair"] == certainty.fair_worst((80, 80, 80), (1 / 3, 1 / 3, 1 / 3))
    target = np.array([0.2, 0.2, 0.6])  # "c" has most, and least of what it should have
    sure = certainty.certainty(counts, np.zeros(3, int), ["x", "y", "z"], ["a", "b", "c"], target)
    assert sure["worst_group"]["class"] == "c" and sure["worst_prompt"]["prompt"] == "x"
    nothing = certainty.certainty(np.zeros((2, 2), int), np.zeros(2, int), ["x", "y"], ["a", "b"])
    for key in ("rms_gap", "mean_gap", "smallest_gap_seen", "bounds", "worst_prompt", "worst_group"):
        assert nothing[key] is None, key
    assert nothing["fair"] == {
        "statistic": None,
        "df": 0,
        "p": None,
        "upper": None,
        "said": "no image is known",
    }
    lean, of_few = np.array([0.75, 0.25]), np.array([[9, 7], [30, 10], [0, 0]])
    some = certainty.certainty(of_few, np.array([4, 0, 0]), list("xyz"), ["a", "b"], lean)
    assert some["smallest_gap_seen"] == fair.smallest_gap(2, 2 / (1 / 16 + 1 / 40), lean)
    assert some["bounds"] == bounds(np.array([[9, 7], [30, 10]]), np.array([4, 0]), lean)


def test_before_against_after_swaps_within_prompts():
    """Exactly, over all swaps, of a few prompts; a share alone (McNemar) would see nothing in .9 -> .1."""
    before, after = (
        np.array([[54, 6], [50, 10], [6, 54], [48, 12]]),
        np.array([[33, 27], [28, 32], [30, 30], [45, 15]]),
    )
    change = squared_gaps(after, HALF) - squared_gaps(before, HALF)
    swapped = [np.mean(change * signs) for signs in itertools.product((1, -1), repeat=4)]
    found = paired(before, after, HALF)
    assert found["p"] == np.mean(np.abs(swapped) >= abs(change.mean()) - 1e-12) == 1 / 8
    assert found["difference"] == pytest.approx(change.mean()) and found["difference"] < 0
    assert paired(np.tile(before, (7, 1)), np.tile(after, (7, 1)), HALF)["low"] is None  # 28 prompts
    turned = paired(before, before[:, ::-1], HALF)
    assert turned["p"] == 1 and turned["difference"] == 0
    many = paired(np.tile(before, (8, 1)), np.tile(after, (8, 1)), HALF)
    half = (many["high"] - many["low"]) / 2
    assert many["low"] + half == pytest.approx(change.mean())
    assert half == pytest.approx(2.0395 * np.tile(change, 8).std(ddof=1) / 32**0.5, rel=1e-3)
    assert paired(before[:1], after[:1], HALF) is None


def test_diversity_is_within_a_prompt_and_a_class():
    x = np.array([[1.0, 0], [0, 1], [1, 0], [-1, 0]])
    assert diversity([x], [np.array([0, 0, 1, 1])]) == pytest.approx((1 + 2) / 2)
    assert diversity([x, x], [np.array([0, 0, 1, -1]), np.array([2, 1, 2, 0])]) == pytest.approx((1 + 0) / 2)
    assert diversity([x], [np.array([0, 1, 2, 3])]) is None


def test_intervals_hold_95_percent():
    """A small simulation; docs/results/coverage.json has the large one."""
    rng = np.random.default_rng(1)
    of_gaps = ((2, 10), (4, 10), (8, 50)), (0, 0.1, 0.5)
    cells = {
        "share": [coverage.one_share(60, share, 800, rng) for share in coverage.SHARES],
        "gap": [
            coverage.raw_gap(K, P, "mixed", gap, 200, rng) for (K, P), gap in itertools.product(*of_gaps)
        ],
    }
    for of_cells in cells.values():
        for name in of_cells[0]:
            held = [hits[name].mean() for hits in of_cells if name in hits]
            if not name.startswith(coverage.NOT_USED):
                assert 0.93 < np.mean(held) < 0.985 and min(held) > 0.88, (name, held)
