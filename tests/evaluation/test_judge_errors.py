"""Shares and gaps without a judge's errors: against other optimisers, other programs and the known truth."""

import itertools
import json
from dataclasses import replace

import interval_coverage as coverage
import numpy as np
import pytest
from scipy.optimize import approx_fprime, minimize
from scipy.stats import norm

from fairref.evaluation import judge_errors
from fairref.evaluation.gaps import squared_gap, squared_gaps
from fairref.evaluation.judge_errors import (
    confusion_matrix,
    corrected,
    corrected_gap,
    corrected_mean_gap,
    corrected_rms,
    is_told,
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


def test_the_likeliest_shares_at_an_edge_that_is_reached_slowly():
    """There no share that is taken can gain, and no other share could: the gradient, less 1, is 0 or below."""
    M = confusion_matrix(np.array([[40, 32, 28], [30, 38, 32], [28, 33, 39]]))
    judged = np.array([0.42, 0.25, 0.33])
    shares = true_shares(judged, M)
    assert shares[1] < 1e-6
    assert (judged / (M @ shares)) @ M - 1 == pytest.approx([0, -0.01773, 0], abs=1e-6)


@pytest.mark.parametrize("M", [[[1, 1], [0, 0]], [[1, 0, 0], [0, 1, 1], [0, 0, 0]]], ids=str)
def test_what_M_rules_out_takes_no_share_away(M):
    K = len(M)
    assert true_shares(np.full(K, 1 / K), np.array(M, float)).sum() == pytest.approx(1)


def test_two_classes_are_rogan_and_gladens():
    """(p̂ + specificity - 1) / (sensitivity + specificity - 1), clipped."""
    M = confusion_matrix(np.array([[90, 10], [20, 180]]))
    judged = np.array([[0.4, 0.6], [0.05, 0.95], [0.97, 0.03]])
    expected = [(0.4 + 0.9 - 1) / (0.9 + 0.9 - 1), 0, 1]
    assert true_shares(judged, M)[:, 0] == pytest.approx(expected)
    by_em = true_shares(np.array([[0.05, 0.95]]), np.array([[0.9, 0.9], [0.1, 0.1]]))  # M tells nothing
    assert by_em[0] == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("counts", [(700, 2300), (30, 2970), (2900, 100)])
def test_the_interval_of_a_share_is_that_of_lang_and_reiczigel_before_its_shift(counts):
    """Two classes, one image added to each of M's counts for its noise, a half to its centre; at edges around them."""
    labelled = np.array([[90, 10], [20, 180]])
    n = sum(counts) + Z**2
    p = (counts[0] + Z**2 / 2) / n
    sensitivity, specificity = 90.5 / 101, 180.5 / 201
    youden = sensitivity + specificity - 1
    centre = np.clip((p + specificity - 1) / youden, 0, 1)
    noise = [a * (1 - a) / m for a, m in ((91 / 102, 102), (181 / 202, 202))]
    half = Z * np.sqrt(p * (1 - p) / n + centre**2 * noise[0] + (1 - centre) ** 2 * noise[1]) / youden
    low, high = share_intervals(np.array(counts), labelled)
    assert (low[0], high[0]) == pytest.approx((max(centre - half, 0), min(centre + half, 1)))
    assert (low[1], high[1]) == pytest.approx((1 - high[0], 1 - low[0]))
    low, high = share_intervals(np.array(counts), np.array([[50, 50], [50, 50]]))
    assert low.tolist() == [0, 0] and high.tolist() == [1, 1]


def test_an_interval_holds_its_value():
    """In a report it is stretched to the likeliest shares, which may be elsewhere than M⁻¹ p̂."""
    counts, labelled = (
        np.array([[3, 1371, 0, 1143, 12439, 9, 1666, 3369]]),
        np.diag([48, 49, 50, 48, 48, 0, 50, 0]),
    )
    for k, j in ((0, 1), (0, 2), (1, 3), (3, 2), (3, 4)):
        labelled[k, j] += 1
    labelled[4, 5], labelled[6, 5] = 2, 4
    labelled[5] = [9, 1, 2, 5, 15, 445, 23, 0]
    labelled[7] = [1300, 1729, 1131, 315, 510, 2019, 611, 92385]
    value = true_shares(counts[0] / counts.sum(), confusion_matrix(labelled))
    assert value[4] < share_intervals(counts[0], labelled)[0][4]
    share = corrected(counts, labelled, "", list("abcdefgh"), np.full(8, 1 / 8))["share"]["e"]
    assert share[0] == share[1] == pytest.approx(value[4])


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


def test_what_Ms_noise_adds_to_the_gap_of_few_images_is_taken_off():
    """Σ_k p_k² times the noise of column k; p_k² is without the images' noise. For two classes the gap is 2 p - 1."""
    labelled, n = np.array([[80, 20], [25, 75]]), 5
    few, exact = (
        corrected_gap(np.array([[3, 2]]), m, np.array([0.5, 0.5])) for m in (labelled, 10**9 * labelled)
    )
    p, noise = (0.6 - 0.25) / 0.55, 0.6 * 0.4 / (n - 1) / 0.55**2
    of_M = [a * (1 - a) / 102 / 0.55**2 for a in (81 / 102, 76 / 102)]
    expected = 4 * ((p**2 - noise) * of_M[0] + ((1 - p) ** 2 - noise) * of_M[1])
    assert exact.value - few.value == pytest.approx(expected, rel=1e-6)


TWO = np.array([[95, 5], [30, 70]])


@pytest.mark.parametrize(
    ("labelled", "p", "target"),
    [(TWO, (0.7, 0.3), (0.5, 0.5)), (TWO, (0.5, 0.5), (0.75, 0.25)), (LABELLED, (0.5, 0.3, 0.2), EVEN)],
    ids=str,
)
def test_the_mean_gap_takes_Ms_error_along(labelled, p, target):
    """By the slope that another program finds; and the shares' scatter over prompts, whatever the edges cut off."""
    M, noise = confusion_matrix(labelled), judge_errors.confusion_noise(labelled)
    counts = np.random.default_rng(0).multinomial(60, M @ p, 40)

    def values(flat):
        return bias(np.linalg.solve(flat.reshape(M.shape), counts.T / 60).T, target)

    slope = approx_fprime(M.ravel(), lambda flat: values(flat).mean(), 1e-7).reshape(M.shape)
    variance = np.var(values(M), ddof=1) / 40
    variance += sum(column @ of_column @ column for column, of_column in zip(slope.T, noise, strict=True))
    found = corrected_mean_gap(counts, labelled, np.array(target))
    assert found["value"] == pytest.approx(bias(true_shares(counts / 60, M), target).mean())
    assert found["high"] - found["value"] == pytest.approx(Z * variance**0.5, rel=1e-4)
    assert found["low"] == pytest.approx(max(found["value"] - Z * variance**0.5, 0), rel=1e-4)


def test_intervals_at_an_edge_are_not_of_no_width():
    """All prompts are where M ends: the judge can say no more of one class."""
    labelled, target = np.array([[190, 10], [20, 180]]), np.array([0.5, 0.5])
    counts = np.array([[58, 2]] * 30 + [[57, 3]] * 10)
    mean = corrected_mean_gap(counts, labelled, target)
    assert mean["value"] > 0.99 and 0.8 < mean["low"] < 0.95 and mean["high"] == 1
    gap = replace(corrected_gap(counts, labelled, target), value=1.19)
    low, high = corrected_rms(gap)[1:]
    assert low < 0.97 and high == 1
    useless = corrected_mean_gap(counts[:, ::-1], np.array([[51, 49], [49, 51]]), target)
    assert (useless["low"], useless["high"]) == (0, 1)


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
    report = prediction_powered(others, 2 * labelled, ["a", "b", "c"])
    value, _, _ = judge_errors.powered_shares(others, 2 * labelled)
    _, low, high = judge_errors.powered_shares(others, 2 * labelled + Z**2 / 9)
    assert list(report["share"].values()) == [pytest.approx(e) for e in zip(value, low, high, strict=True)]
    assert all(low < value < high for value, low, high in report["share"].values())
    assert report["labelled"] == [94, 68, 38]
    few = prediction_powered(others, labelled, ["a", "b", "c"])  # 100 labels
    assert [v for v, *_ in few["share"].values()] == pytest.approx(values) and "fewer than 200" in few[
        "method"
    ]
    assert all(ends == [None, None] for _, *ends in few["share"].values())
    all_labelled = prediction_powered(np.zeros(3, int), labelled, ["a", "b", "c"])["share"]
    assert [v for v, *_ in all_labelled.values()] == pytest.approx([0.47, 0.34, 0.19])


def test_what_a_report_gets():
    classes, counts = ["a", "b", "c"], np.random.default_rng(0).multinomial(80, [0.5, 0.3, 0.2], 30)
    found = corrected(counts, LABELLED, "somewhere", classes, EVEN)
    assert set(found) == {
        "confusion",
        "labelled",
        "source",
        "mean_gap",
        "rms_gap",
        "upper",
        "share",
        "method",
    }
    assert found["confusion"] == confusion_matrix(LABELLED).tolist() and found["labelled"] == [200, 100, 300]
    assert all(low <= value <= high for value, low, high in found["share"].values())
    assert sum(value for value, *_ in found["share"].values()) == pytest.approx(1)
    assert found["rms_gap"]["low"] < found["rms_gap"]["value"] < found["upper"] < found["rms_gap"]["high"]
    more = corrected(np.vstack([counts, [[1, 0, 0]]]), LABELLED, "", classes, EVEN)
    assert more["rms_gap"] == found["rms_gap"]  # a prompt with one image says nothing of its gap
    assert corrected(counts[:29], LABELLED, "", classes, EVEN)["mean_gap"] is None
    few = corrected(counts, LABELLED // 10, "", classes, EVEN)
    assert (
        few["rms_gap"] is None and few["share"]["a"][1:] == [None, None] and "fewer than 50" in few["method"]
    )
    alike = corrected(np.full((30, 3), 20), np.full((3, 3), 60), "", classes, EVEN)
    assert alike["rms_gap"] is None and alike["share"]["b"][1:] == [0, 1]
    assert is_told(np.array([[0.51, 0.49], [0.49, 0.51]]) + 0.0098 * (1 - 2 * np.eye(2)))
    assert corrected(counts, np.diag([60, 60, 0]), "", classes, EVEN) is None
    assert corrected(0 * counts, LABELLED, "", classes, EVEN) is None


@pytest.mark.parametrize(
    ("counts", "labelled"),
    [
        ([[58, 2]] * 50, [[900, 100], [100, 900]]),
        ([[40, 20]] * 35, [[51, 49], [50, 50]]),
        ([[58, 2], [2, 58]] * 25, [[900, 100], [100, 900]]),  # only the prompts are beyond what M allows
        ([[30, 30, 20]] * 35, [[60, 0, 0], [0, 60, 0], [0, 60, 0]]),
    ],
    ids=str,
)
def test_where_no_shares_explain_the_counts_there_is_no_interval(counts, labelled):
    classes = list("abc")[: len(labelled)]
    found = corrected(
        np.array(counts), np.array(labelled), "", classes, np.full(len(classes), 1 / len(classes))
    )
    assert (
        found["method"] == judge_errors.MISFIT
        and found["mean_gap"] is found["rms_gap"] is found["upper"] is None
    )
    assert sum(v for v, *_ in found["share"].values()) == pytest.approx(1)
    assert all(ends == [None, None] for _, *ends in found["share"].values())


def test_true_shares_are_called_unexplained_in_less_than_1_of_20():
    """Of a model with one class alone, the farthest at an edge that there is."""
    rng, M = np.random.default_rng(0), confusion_matrix(LABELLED)
    judges, counts = drawn_judges(100, rng), rng.multinomial(3000, M[:, 0], 100)
    said = [
        judge_errors.is_explained(c, of, true_shares(c / 3000, confusion_matrix(of)))
        for c, of in zip(counts, judges, strict=True)
    ]
    assert 0.95 < np.mean(said) < 1


def test_a_judge_that_says_the_contrary_is_not_corrected():
    found = corrected(
        np.array([[40, 20]] * 35), np.array([[40, 60], [60, 40]]), "", ["a", "b"], np.full(2, 0.5)
    )
    assert found["share"] == {"a": [None] * 3, "b": [None] * 3} and found["method"] == judge_errors.SWAPPED
    assert found["rms_gap"] is found["mean_gap"] is None


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


@pytest.mark.parametrize(
    ("labelled", "counts"),
    [([[60, 0], [60, 0]], [[0, 60]]), ([[60, 0, 0, 0]] * 2 + [[0, 60, 0, 0]] * 2, [[0, 0, 30, 30]])],
)
def test_classes_that_the_judge_never_said_of_labelled_images_give_no_shares(labelled, counts):
    """Nor NaN, which JSON does not know."""
    classes = list("abcd")[: len(labelled)]
    found = judge_errors.corrected(
        np.array(counts), np.array(labelled), "", classes, np.full(len(classes), 1 / len(classes))
    )
    assert found["share"] == {k: [None] * 3 for k in classes} and found["rms_gap"] is None
    json.dumps(found, allow_nan=False)
