"""Shares and gaps without a judge's errors: against other optimisers, other programs and the known truth."""

import itertools

import interval_coverage as coverage
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from fairref.evaluation import judge_errors
from fairref.evaluation.gaps import squared_gap, squared_gaps
from fairref.evaluation.judge_errors import (
    confusion_matrix,
    corrected,
    corrected_gap,
    corrected_mean_gap,
    prediction_powered,
    share_intervals,
    true_shares,
)
from fairref.fairness.metrics import bias

Z = norm.ppf(0.975)
# row: the class; column: what the judge says. Far from symmetric, so that a transposed M shows
LABELLED = np.array([[180, 15, 5], [10, 80, 10], [30, 60, 210]])
EVEN = np.full(3, 1 / 3)


def drawn_judges(R, rng):
    """R tables of labelled images (R, 3, 3), as LABELLED may have come out."""
    rows = zip(LABELLED.sum(1), LABELLED, strict=True)
    return np.stack([rng.multinomial(n, row / n, R) for n, row in rows], 1)


def test_M_has_a_column_for_each_true_class():
    M = confusion_matrix(LABELLED)
    assert M[:, 0] == pytest.approx([0.9, 0.075, 0.025]) and M[0] == pytest.approx([0.9, 0.1, 0.1])
    assert confusion_matrix(LABELLED, 1.0)[:, 1] == pytest.approx([11 / 103, 81 / 103, 11 / 103])


@pytest.mark.parametrize("judged", [(0.5, 0.3, 0.2), (0.95, 0.04, 0.01), (0.1, 0.2, 0.7), (0.05, 0.9, 0.05)])
def test_shares_are_the_likeliest_on_the_simplex(judged):
    """Another optimiser finds them, too: inside they are M⁻¹ p̂, at an edge they are not."""
    judged, M = np.array(judged), confusion_matrix(LABELLED)

    def loss(p):
        return -(judged * np.log(M @ p)).sum()

    peer = minimize(
        loss, EVEN, bounds=[(0, 1)] * 3, constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, tol=1e-12
    ).x
    found = true_shares(judged, M)
    assert found == pytest.approx(peer, abs=2e-4) and found.sum() == pytest.approx(1) and found.min() >= 0
    straight = np.linalg.solve(M, judged)
    assert (found == pytest.approx(straight, abs=1e-9)) == (straight.min() >= 0)


def test_two_classes_are_rogan_and_gladens():
    """(p̂ + specificity - 1) / (sensitivity + specificity - 1), clipped."""
    M = confusion_matrix(np.array([[90, 10], [20, 180]]))
    judged = np.array([[0.4, 0.6], [0.05, 0.95], [0.97, 0.03]])
    expected = [(0.4 + 0.9 - 1) / (0.9 + 0.9 - 1), 0, 1]
    assert true_shares(judged, M)[:, 0] == pytest.approx(expected)
    by_em = true_shares(np.array([[0.05, 0.95]]), np.array([[0.9, 0.9], [0.1, 0.1]]))  # M tells nothing
    assert by_em[0] == pytest.approx([0.5, 0.5])


def test_the_interval_of_a_share_is_that_of_lang_and_reiczigel_before_its_shift():
    """Two classes, one image added to each of M's counts for its noise; a half to its centre."""
    labelled, counts = np.array([[90, 10], [20, 180]]), np.array([700, 2300])
    n = counts.sum() + Z**2
    p = (700 + Z**2 / 2) / n
    sensitivity, specificity = 90.5 / 101, 180.5 / 201
    youden = sensitivity + specificity - 1
    centre = (p + specificity - 1) / youden
    noise = [a * (1 - a) / m for a, m in ((91 / 102, 102), (181 / 202, 202))]
    half = Z * np.sqrt(p * (1 - p) / n + centre**2 * noise[0] + (1 - centre) ** 2 * noise[1]) / youden
    low, high = share_intervals(counts, labelled)
    assert (low[0], high[0]) == pytest.approx((centre - half, centre + half))
    assert (low[1], high[1]) == pytest.approx((1 - high[0], 1 - low[0]))
    low, high = share_intervals(counts, np.array([[50, 50], [50, 50]]))
    assert low.tolist() == [0, 0] and high.tolist() == [1, 1]


def test_its_covariance_is_that_of_drawn_judges_and_images():
    """M⁻¹ [Σ_p̂ + Σ_k p_k² Σ_{M_k}] M⁻ᵀ, against draws."""
    rng, p, M = np.random.default_rng(0), np.array([0.5, 0.2, 0.3]), confusion_matrix(LABELLED)
    labelled = drawn_judges(8000, rng)
    counts = rng.multinomial(3000, M @ p, 8000)
    drawn = np.linalg.solve(confusion_matrix(labelled), (counts / 3000)[..., None])[..., 0]
    low, high = share_intervals(3000 * M @ p, LABELLED)
    assert (high - low) / 2 / Z == pytest.approx(drawn.std(0), rel=0.06)


def test_a_judge_without_errors_changes_no_gap():
    counts = np.random.default_rng(0).multinomial(80, [0.5, 0.3, 0.2], 6)
    sure = np.eye(3, dtype=int) * 10**9
    plain, found = squared_gap(counts, EVEN), corrected_gap(counts, sure, EVEN)
    for name in ("value", "alone", "with_gap", "fair_alone", "fair_slope"):
        assert getattr(found, name) == pytest.approx(getattr(plain, name), rel=1e-5, abs=1e-9), name


@pytest.mark.parametrize("target", [EVEN, np.array([0.6, 0.3, 0.1])], ids=str)
def test_the_corrected_gap_is_unbiased_and_its_variance_holds_Ms_error(target):
    """M's error is drawn once for all prompts, as it is."""
    rng, M = np.random.default_rng(0), confusion_matrix(LABELLED)
    shares = np.array([[0.7, 0.2, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4], [0.6, 0.3, 0.1]])
    labelled = drawn_judges(6000, rng)
    counts = rng.multinomial(400, shares @ M.T, (6000, 4))
    found = corrected_gap(counts, labelled, target)
    pairs = [(i, j) for i, j in itertools.combinations(range(3), 2)]
    d = shares - target
    truth = np.mean([(d[:, i] - d[:, j]) ** 2 for i, j in pairs])
    scatter = found.value.std()
    assert found.value.mean() == pytest.approx(truth, abs=4 * scatter / 6000**0.5 + 0.1 * scatter)
    assert (found.alone + found.with_gap).mean() == pytest.approx(scatter**2, rel=0.1)
    images = corrected_gap(counts, 10**6 * M.T, target)
    assert (images.alone + images.with_gap).mean() < 0.8 * scatter**2  # without M's error it is too short


def test_near_the_target_the_corrected_gap_scatters_by_what_a_fair_model_does():
    """The same formulas at the shares of a fair model; and a gap adds the slope, on average over its directions."""
    rng, M, target = np.random.default_rng(0), confusion_matrix(LABELLED), np.array([0.6, 0.3, 0.1])
    found = corrected_gap(rng.multinomial(400, M @ target, (2000, 5)), drawn_judges(2000, rng), target)
    assert found.value.mean() == pytest.approx(0, abs=4 * found.value.std() / 2000**0.5)
    assert found.fair_alone.mean() == pytest.approx(found.alone.mean(), rel=0.1)
    assert (found.alone + found.with_gap).mean() == pytest.approx(found.value.var(), rel=0.15)
    added = []
    for lean in np.array([[1, -1, 0], [1, 0, -1], [0, 1, -1]]):
        shares = np.tile(target + 0.03 * lean, (2, 1))
        moved = corrected_gap(10**7 * shares @ M.T, 10**4 * LABELLED, target)
        added.append(moved.with_gap / moved.value)
        assert moved.value == pytest.approx(squared_gaps(1e9 * shares, target).mean(), rel=1e-3)
    assert moved.fair_slope == pytest.approx(np.mean(added), rel=0.03)


def test_the_mean_gap_takes_Ms_error_along():
    """Against M's own draws, the counts being as they are."""
    rng, M = np.random.default_rng(0), confusion_matrix(LABELLED)
    counts = rng.multinomial(300, rng.dirichlet(np.full(3, 5.0), 40) @ M.T)
    found = corrected_mean_gap(counts, LABELLED, EVEN)
    judged = counts / 300
    values = bias(true_shares(judged, M), EVEN)
    drawn = [
        bias(true_shares(judged, confusion_matrix(labelled)), EVEN).mean()
        for labelled in drawn_judges(300, rng)
    ]
    expected = np.sqrt(np.var(drawn) + values.var(ddof=1) / 40)
    assert found["value"] == pytest.approx(values.mean())
    assert found["high"] - found["value"] == pytest.approx(Z * expected, rel=0.1)
    assert np.std(drawn) > 0.5 * expected / 2


def test_prediction_powered_shares_are_ppi_pythons():
    """Values of ppi_mean_pointestimate and, where nothing is added to the counts, ppi_mean_ci(alpha=0.05) of ppi-python
    0.2.3, for each class."""
    labelled, others = np.array([[40, 5, 2], [3, 30, 1], [4, 6, 9]]), np.array([800, 700, 300])
    values = [0.4524585051312323, 0.32650563483108785, 0.2116355745010657]
    lows = [0.38259557865261573, 0.25767820515351747, 0.14489713537258717]
    highs = [0.5223214316098493, 0.395333064508658, 0.27837401362954417]
    found = judge_errors.powered_shares(others, labelled)
    for mine, peers in zip(found, (values, lows, highs), strict=True):
        assert mine == pytest.approx(peers, rel=1e-12)
    report = prediction_powered(others, labelled, ["a", "b", "c"])
    assert [v for v, *_ in report["share"].values()] == pytest.approx(values)
    assert all(low < value < high for value, low, high in report["share"].values())
    assert report["labelled"] == [47, 34, 19]
    all_labelled = prediction_powered(np.zeros(3, int), labelled, ["a", "b", "c"])["share"]
    assert [v for v, *_ in all_labelled.values()] == pytest.approx([0.47, 0.34, 0.19])


def test_what_a_report_gets():
    classes, counts = ["a", "b", "c"], np.random.default_rng(0).multinomial(80, [0.5, 0.3, 0.2], 30)
    found = corrected(counts, LABELLED, "somewhere", classes, EVEN)
    assert set(found) == {"confusion", "labelled", "source", "mean_gap", "rms_gap", "share", "method"}
    assert found["confusion"] == confusion_matrix(LABELLED).tolist() and found["labelled"] == [200, 100, 300]
    assert all(low <= value <= high for value, low, high in found["share"].values())
    assert sum(value for value, *_ in found["share"].values()) == pytest.approx(1)
    assert found["rms_gap"]["low"] < found["rms_gap"]["value"] < found["rms_gap"]["high"]
    assert corrected(counts[:29], LABELLED, "", classes, EVEN)["mean_gap"] is None
    few = corrected(counts, LABELLED // 10, "", classes, EVEN)
    assert (
        few["rms_gap"] is None and few["share"]["a"][1:] == [None, None] and "fewer than 50" in few["method"]
    )
    alike = corrected(counts, np.full((3, 3), 60), "", classes, EVEN)
    assert alike["rms_gap"] is None and alike["share"]["b"][1:] == [0, 1]
    assert corrected(counts, np.diag([60, 60, 0]), "", classes, EVEN) is None
    assert corrected(0 * counts, LABELLED, "", classes, EVEN) is None


def test_corrected_intervals_hold_95_percent():
    """A small simulation; docs/results/coverage.json has the large one."""
    rng, judge = np.random.default_rng(1), (0.8, "next")
    cells = [
        coverage.corrected_share(K, 50, 50, *judge, s, 200, rng) for K in (2, 4, 8) for s in coverage.SHARES
    ]
    cells += [
        coverage.corrected_gap(K, 50, 10, *judge, gap, 100, rng)
        for K in (2, 4, 8)
        for gap in (0, 0.1, 0.5, 0.9)
    ]
    for name in ("corrected share", "corrected rms gap"):
        held = [hits[name].mean() for hits in cells if name in hits]
        assert 0.93 < np.mean(held) < 0.985 and min(held) > 0.87, (name, held)
