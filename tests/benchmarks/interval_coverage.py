"""How often intervals hold what they should: simulated models and judges, whose shares and errors are known.

    python tests/benchmarks/interval_coverage.py --runs 5000 --folder runs/coverage --out docs/results/coverage.json

A row is an interval in a situation, over a grid: of a class's share, or of a gap as a part of the largest that there
can be. Rows marked "not used" are what else was tried. Of tests it is how often they reject.
"""

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from measure import table
from scipy.special import chndtrinc
from scipy.stats import chi2, false_discovery_control, ttest_1samp

from fairref.evaluation import certainty, fair, gaps, judge_errors
from fairref.evaluation.gaps import LEVEL, Z_ONE_SIDED, Z, share_covariance, squared_gap, squared_gaps
from fairref.fairness.metrics import bias
from fairref.files.paths import read_json, write_json

SHARES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
GAPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
FAR_FROM_EQUAL = ((0.7, 0.2, 0.08, 0.02), (0.9, 0.08, 0.01, 0.01))
IMAGES = {2: 60, 4: 80, 8: 160}  # of each prompt, by K
POPULATIONS = {"fair": 1e6, "mild": 4.0, "strong": 0.4}  # of prompts: Dirichlet's parameter
PART = 1000  # runs at once
SOME = 100  # what is slow is done in one run of so many
NOT_USED = "not used: "
Hits = dict[str, np.ndarray]  # interval -> (R,) or (R, m) bool: it holds the truth
Cell = Callable[[int, np.random.Generator], Hits]  # R runs


def leaning(K: int, P: int, gap: float, shape: str, target: np.ndarray | None = None) -> np.ndarray:
    """Shares (P, K) that lean, each prompt to a class of its own or all to the first, equally or from 0 on."""
    lean = np.full(P, gap) if shape != "mixed" or P == 1 else np.minimum(gap * np.linspace(0, 3**0.5, P), 1)
    leader = np.eye(K)[np.arange(P) % K if shape != "first" else np.zeros(P, int)]
    return (1 - lean[:, None]) * (1 / K if target is None else target) + lean[:, None] * leader


def rms_of(shares: np.ndarray, target: np.ndarray | float | None = None) -> float:
    """The rms gap of shares (P, K) from a target's, or from equal ones."""
    K = shares.shape[-1]
    return float(
        np.sqrt((2 / (K - 1) * np.square(shares - (1 / K if target is None else target)).sum(-1)).mean())
    )


def unequal(K: int) -> np.ndarray:
    """A target (K,) with three quarters for the first class."""
    return np.array([0.75, *[0.25 / (K - 1)] * (K - 1)])


def confusion(K: int, right: float, kind: str) -> np.ndarray:
    """M (K, K) of a judge that errs to all other classes alike, or to the next class mostly; "more": of the first class
    four times as often as of others."""
    M = np.eye(K) * right
    if kind == "more":
        often = 1 - right * np.eye(K)[0] - np.sqrt(right) * (1 - np.eye(K)[0])
        return np.diag(1 - often) + (1 - np.eye(K)) * often / (K - 1)
    if kind == "even" or K == 2:
        return M + (1 - np.eye(K)) * (1 - right) / (K - 1)
    return M + (1 - right) * (0.8 * np.roll(np.eye(K), 1, 0) + 0.2 * np.roll(np.eye(K), -1, 0))


def labelled_by(M: np.ndarray, n: int, R: int, rng: np.random.Generator) -> np.ndarray:
    """Labelled images (R, K, K), n of each class, row by row."""
    return rng.multinomial(n, M.T, (R, len(M)))


def within(ends: tuple[np.ndarray, np.ndarray], truth: np.ndarray) -> np.ndarray:
    """Whether intervals hold the truth, to rounding."""
    return (ends[0] <= truth + 1e-9) & (truth <= ends[1] + 1e-9)


def one_share(n: int, share: float, R: int, rng: np.random.Generator) -> Hits:
    ends = np.array([certainty.share(int(x), n)[1:] for x in rng.binomial(n, share, R)]).T
    return {"share (Wilson)": within(ends, share)}


def raw_gap(K: int, P: int, shape: str, gap: float, R: int, rng: np.random.Generator) -> Hits:
    shares, target = leaning(K, P, gap, shape), np.full(K, 1 / K)
    counts, truth = rng.multinomial(IMAGES[K], shares, (R, P)), rms_of(shares)
    found = squared_gap(counts, target)
    standard_error = np.sqrt(np.maximum(found.with_gap + found.alone, found.alone))
    wald = [np.sqrt(np.maximum(found.value + z * standard_error, 0)) for z in (-Z, Z)]
    bound = found.rms(Z_ONE_SIDED)[2] if K > 2 else np.array([fair.upper_bound(c, target) for c in counts])
    hits = {
        "rms gap": within(found.rms()[1:], truth),
        "rms gap, upper bound": bound >= truth - 1e-9,
        f"{NOT_USED}rms gap ± 1.96 SE": within(wald, truth),
    }
    if K == 2:
        T = IMAGES[K] * np.square(np.arcsin((counts @ [1, -1]) / IMAGES[K])).sum(-1)
        ends = []
        for quantile in ((1 + LEVEL) / 2, (1 - LEVEL) / 2):
            some = chi2.cdf(T, P) > quantile
            nc = np.where(some, chndtrinc(np.where(some, T, P + 9), P, quantile), 0)
            ends.append(np.sin(np.minimum(np.sqrt(nc / (IMAGES[K] * P)), np.pi / 2)))
        hits[f"{NOT_USED}rms gap by T"] = within(ends, truth)
    return hits


def mean_gap(K: int, P: int, population: str, R: int, rng: np.random.Generator) -> Hits:
    def values(*size):
        return bias(rng.multinomial(IMAGES[K], rng.dirichlet(np.full(K, POPULATIONS[population]), size)))

    truth, few = values(200_000).mean(), partial(gaps.over_prompts, resamples=499)
    return {"mean gap (BCa over prompts)": within(np.array([few(v) for v in values(R, P)]).T, truth)}


def change(K: int, P: int, kept: float, R: int, rng: np.random.Generator) -> Hits:
    """A finetuned model keeps a part of every prompt's lean."""
    target = np.full(K, 1 / K)

    def values(*size):
        shares = rng.dirichlet(np.full(K, 2.0), size)
        after = target + kept * (shares - target)
        before, after = (squared_gaps(rng.multinomial(IMAGES[K], p), target) for p in (shares, after))
        return after - before

    interval = ttest_1samp(values(R, P), 0, axis=1).confidence_interval(LEVEL)
    return {"change of the squared gap (t over prompts)": within(interval, values(200_000).mean())}


def corrected_share(
    K: int, labelled: int, P: int, right: float, kind: str, share: float, R: int, rng: np.random.Generator
) -> Hits:
    M, shares = confusion(K, right, kind), np.array([share, *[(1 - share) / (K - 1)] * (K - 1)])
    counts, known = rng.multinomial(IMAGES[K] * P, M @ shares, R), labelled_by(M, labelled, R, rng)
    some = max(R // SOME, 1)
    ends = {
        "corrected share": judge_errors.share_intervals(counts, known),
        f"{NOT_USED}corrected share, delta on counts as they are": raw_delta(counts, known),
        f"{NOT_USED}corrected share, Dirichlet replicates": replicates(counts[:some], known[:some], rng),
    }
    return {name: within(of_name, shares)[:, :2] for name, of_name in ends.items()}


def raw_delta(counts: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """M⁻¹ p̂ ± 1.96 standard errors, nothing added to a count."""
    n, M = counts.sum(-1), judge_errors.confusion_matrix(labelled)
    inverse, judged = np.linalg.pinv(M), counts / n[:, None]
    shares = (inverse @ judged[..., None])[..., 0]
    of_M = share_covariance(M.swapaxes(1, 2), labelled.sum(-1))  # (R, k, K, K)
    noise = share_covariance(judged, n) + np.einsum("rk,rkij->rij", np.clip(shares, 0, 1) ** 2, of_M)
    half = Z * np.sqrt(np.maximum(np.einsum("rki,rij,rkj->rk", inverse, noise, inverse), 0))
    return np.clip([shares - half, shares + half], 0, 1)


def replicates(
    counts: np.ndarray, labelled: np.ndarray, rng: np.random.Generator, B: int = 300
) -> np.ndarray:
    """Quantiles of M⁻¹ p̂, both drawn from what their counts leave open."""
    drawn = [rng.standard_gamma(c[:, None] + 0.5, (len(c), B, *c.shape[1:])) for c in (counts, labelled)]
    judged, columns = (x / x.sum(-1, keepdims=True) for x in drawn)
    shares = (np.linalg.pinv(columns.swapaxes(-1, -2)) @ judged[..., None])[..., 0]
    return np.clip(np.quantile(shares, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=1), 0, 1)


def corrected_gap(
    K: int,
    labelled: int,
    P: int,
    right: float,
    kind: str,
    gap: float,
    R: int,
    rng: np.random.Generator,
    target: np.ndarray | None = None,
) -> Hits:
    M, shares = confusion(K, right, kind), leaning(K, P, gap, "mixed", target)
    counts, known = rng.multinomial(IMAGES[K], shares @ M.T, (R, P)), labelled_by(M, labelled, R, rng)
    found = judge_errors.corrected_gap(counts, known, np.full(K, 1 / K) if target is None else target)
    truth = rms_of(shares, target)
    return {
        "corrected rms gap": within(judge_errors.corrected_rms(found)[1:], truth),
        "corrected rms gap, upper bound": judge_errors.corrected_rms(found, Z_ONE_SIDED)[2] >= truth - 1e-9,
    }


def corrected_mean_gap(
    K: int,
    labelled: int,
    population: str,
    R: int,
    rng: np.random.Generator,
    right: float = 0.9,
    kind: str = "even",
    target: np.ndarray | None = None,
) -> Hits:
    M, target = confusion(K, right, kind), np.full(K, 1 / K) if target is None else target

    def counts(*size):
        return rng.multinomial(IMAGES[K], rng.dirichlet(K * target * POPULATIONS[population], size) @ M.T)

    truth = bias(judge_errors.true_shares(counts(5000) / IMAGES[K], M), target).mean()
    known = labelled_by(M, labelled, R, rng)
    found = [judge_errors.corrected_mean_gap(counts(50), of_run, target) for of_run in known]
    return {"corrected mean gap": np.array([v["low"] <= truth <= v["high"] for v in found])}


def powered(K: int, labelled: int, share: float, R: int, rng: np.random.Generator) -> Hits:
    """Of 3,000 images, `labelled` have a label."""
    M, shares = confusion(K, 0.9, "even"), np.array([share, *[(1 - share) / (K - 1)] * (K - 1)])
    known = rng.multinomial(labelled, (M * shares).T.ravel(), R).reshape(R, K, K)
    counts = rng.multinomial(3000 - labelled, M @ shares, R)
    names = list(map(str, range(K)))
    found = [
        judge_errors.prediction_powered(c, k, names)["share"] for c, k in zip(counts, known, strict=True)
    ]
    return {
        "share, prediction-powered": within(np.array([[of["0"][1], of["0"][2]] for of in found]).T, share)
    }


def tests(K: int, P: int, R: int, rng: np.random.Generator) -> Hits:
    """Rates, not coverage: how often "fair" is rejected, and how many prompts that are called unfair are fair."""
    target, n = np.full(K, 1 / K), IMAGES[K]

    def rejected(gap):
        lean = leaning(K, P, gap / np.sqrt(2 / K), "first")
        return np.array([fair.fair_p(c, target) < 1 - LEVEL for c in rng.multinomial(n, lean, (R, P))])

    unfair = np.arange(P) < P // 2
    shares = np.where(unfair[:, None], leaning(K, P, 0.5, "first"), target)
    wrong = []
    for counts in rng.multinomial(n, shares, (max(R // 5, 1), P)):
        called = false_discovery_control([certainty.p_value(c, target) for c in counts]) <= 1 - LEVEL
        wrong.append((called & ~unfair).sum() / max(called.sum(), 1))
    return {
        'rejections of "fair" where it is (5 %)': rejected(0.0),
        "rejections at the smallest gap seen (80 %)": rejected(fair.smallest_gap(P, n, target)),
        f"{NOT_USED}rejections at the normal approximation's smallest gap (80 %)": rejected(
            fair.normal_gap(P, n, K)
        ),
        "false discoveries among the prompts called unfair (at most 5 %)": np.array(wrong),
    }


def few(target: tuple[float, ...], P: int, n: int, R: int, rng: np.random.Generator) -> Hits:
    """Rates of false alarms where a class has few images to expect: a model that meets the target (K,)."""
    counts = rng.multinomial(n, target, (R, P))
    p = [[certainty.p_value(row, np.array(target)) for row in c] for c in counts]
    statistics = (np.square(counts - n * np.array(target)) / (n * np.array(target))).sum(-1)
    calling = "evaluations of a fair model that call a prompt unfair"
    return {
        'rejections of "fair" where it is (5 %)': np.array(
            [fair.fair_p(c, np.array(target)) < 1 - LEVEL for c in counts]
        ),
        f"{calling} (at most 5 %)": (false_discovery_control(p, axis=1) <= 1 - LEVEL).any(1),
        f"{NOT_USED}{calling}, by χ²": (
            false_discovery_control(chi2.sf(statistics, len(target) - 1), axis=1) <= 1 - LEVEL
        ).any(1),
    }


def aimed(share: float, P: int, n: int, gap: float | None, R: int, rng: np.random.Generator) -> Hits:
    """Of a target (share, 1 - share), from which prompts lean to both sides in turn; None: the rate of rejections."""
    target = np.array([share, 1 - share])
    if gap is None:
        return {
            name: np.array([fair.fair_p(c, target) < 1 - LEVEL for c in counts])
            for at, name in (
                (0.0, 'rejections of "fair" where it is (5 %)'),
                (fair.smallest_gap(P, n, target), "rejections at the smallest gap seen (80 %)"),
            )
            if at is not None
            for counts in [rng.multinomial(n, _two(share, np.full(P, -at / 2)), (R, P))]
        }
    shares = _two(share, gap / 2 * np.where(np.arange(P) % 2, 1, -1))
    counts = rng.multinomial(n, shares, (R, P))
    truth = float(np.sqrt(np.square(2 * (shares[:, 0] - share)).mean()))
    bound = np.array([fair.upper_bound(c, target) for c in counts])
    return {
        "rms gap": within(squared_gap(counts, target).rms()[1:], truth),
        "rms gap, upper bound": bound >= truth - 1e-9,
    }


def _two(share, lean):
    """Shares (P, 2); what would leave [0, 1] leans the other way."""
    first = share + np.where((share + lean < 0) | (share + lean > 1), -lean, lean)
    return np.stack([first, 1 - first], 1)


def cells() -> Iterator[tuple[str, list[Cell]]]:
    """A situation in words, and its cells, one for each point of the grid."""
    for n in (60, 160):
        yield f"{n} images", [partial(one_share, n, share) for share in SHARES]
    judges = (("errs in 1 of 20, to all classes alike", 0.95, "even"), ("errs in 1 of 5", 0.8, "next"))
    for K in IMAGES:
        of = f"K = {K}, {IMAGES[K]} images a prompt"
        for P, shape in product((1, 10, 50), ("equal", "mixed")):
            if P > 1 or shape == "equal":
                yield f"{of}, {P} prompts, {shape} gaps", [partial(raw_gap, K, P, shape, gap) for gap in GAPS]
        for P in (30, 50) if K != 4 else ():
            yield f"{of}, {P} prompts", [partial(mean_gap, K, P, population) for population in POPULATIONS]
        for P, pairs in ((10, 30), (50, 50)):
            yield f"{of}, {pairs} prompts", [partial(change, K, pairs, kept) for kept in (0.2, 0.6, 1.0)]
            yield f"{of}, {P} prompts", [partial(tests, K, P)]
        for (said, right, kind), labelled in product(judges, (50, 200)):
            by = f"a judge {said}, {labelled} labelled images a class"
            for P in (1, 50):
                args = K, labelled, P, right, kind
                yield f"{of}, {P} prompts, {by}", [partial(corrected_share, *args, s) for s in SHARES]
            for P in (1, 10, 50):
                args = K, labelled, P, right, kind
                yield f"{of}, {P} prompts, {by}", [partial(corrected_gap, *args, gap) for gap in GAPS]
        for labelled in (200, 400):
            yield (
                f"K = {K}, {labelled} of 3,000 images labelled",
                [partial(powered, K, labelled, s) for s in SHARES],
            )
        yield (
            f"{of}, 50 prompts, 200 labelled images a class",
            [partial(corrected_mean_gap, K, 200, population) for population in POPULATIONS],
        )
        unlike = {"right": 0.8, "kind": "more", "target": unequal(K)}
        yield (
            f"{of}, 50 prompts, target .75 for a class, of which a judge errs in 1 of 5, 200 labelled images a class",
            [partial(corrected_gap, K, 200, 50, gap=gap, **unlike) for gap in GAPS]
            + [partial(corrected_mean_gap, K, 200, population, **unlike) for population in POPULATIONS],
        )
    for share, P, n in ((0.75, 50, 60), (0.9, 50, 60), (0.5, 150, 6), (0.5, 30, 10)):
        yield (
            f"K = 2, a target of {share:g}, {P} prompts, {n} images a prompt",
            [partial(aimed, share, P, n, gap) for gap in (None, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5)],
        )
    for target in FAR_FROM_EQUAL:
        said = ", ".join(f"{share:g}" for share in target)
        yield f"a target of {said}, 50 prompts", [partial(few, target, 50, n) for n in (30, 60, 160)]


def situation(of_grid: list[Cell], runs: int, seed: int, key: int) -> dict[str, list[float]]:
    """Interval -> how often it holds the truth, of each cell. Draws follow from (seed, key, the cell's place)."""
    found = {}
    for point, cell in enumerate(of_grid):
        rng, parts = np.random.default_rng((seed, key, point)), {}
        for start in range(0, runs, PART):
            for name, hits in cell(R=min(PART, runs - start), rng=rng).items():
                parts.setdefault(name, []).append(hits)
        for name, hits in parts.items():
            found.setdefault(name, []).append(round(float(np.concatenate(hits).mean()), 4))
    return found


def rows(runs: int, seed: int = 0, every: int = 1, kept: Path | None = None) -> list[dict[str, object]]:
    """A row for each interval and situation, or for each `every`-th situation. What is in the folder `kept` is taken
    from there."""
    found = []
    for number, (said, of_grid) in list(enumerate(cells()))[::every]:
        key = zlib.crc32(f"{of_grid[0].func.__name__}, {said}".encode())
        path = kept / f"{runs}-{seed}-{key}.json" if kept else None
        if path and path.exists():
            of_one = read_json(path)
        else:
            of_one = situation(of_grid, runs, seed, key)
            if path:
                write_json(path, of_one)
                print(f"{number + 1}: {said}", flush=True)
        found += [(name, said, values) for name, values in of_one.items()]
    by_name = {}  # two lists of cells may be of one situation
    for name, said, values in found:
        by_name.setdefault((name, said), []).extend(values)
    return [
        {"interval": name, "situation": said, "mean": round(float(np.mean(v)), 4), "least": min(v), "grid": v}
        for (name, said), v in by_name.items()
    ]


def summary(found: list[dict[str, object]]) -> str:
    """A table, an interval a row: the mean over all cells, the range of the situations, and the least of a cell."""
    rows = []
    for name in sorted({row["interval"]: None for row in found}, key=lambda name: name.startswith(NOT_USED)):
        grids = [row["grid"] for row in found if row["interval"] == name]
        means, values = [float(np.mean(grid)) for grid in grids], np.concatenate(grids)
        of_situations = f"{min(means):.3f} to {max(means):.3f}"
        rows.append([name, len(values), f"{values.mean():.3f}", of_situations, f"{values.min():.3f}"])
    return table(["what", "cells", "mean", "of the situations", "least cell"], rows)


def main() -> None:
    """Prints the summary; writes all rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    parser.add_argument("--folder", type=Path, help="of what is done, so that a stopped one goes on")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    found = rows(options.runs, kept=options.folder)
    print(summary(found))
    if options.out:
        text = ",\n".join(f"  {json.dumps(row)}" for row in found)
        options.out.write_text(f'{{"runs": {options.runs}, "rows": [\n{text}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
