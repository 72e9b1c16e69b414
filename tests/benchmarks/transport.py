"""What expected optimal transport costs, and what the released way of the method, 100 draws of POT's emd, gives.

    python tests/benchmarks/transport.py [--repeats 9] [--out FILE]

Medians of interleaved runs. The error is the largest of q, against the exact expectation where it can be
enumerated, else against 200,000 draws.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import ot
import torch
from measure import machine, table, write

from fairref.fairness.transport import expected_ot

CASES = [
    (24, 2),
    (32, 4),
    (32, 8),
    (64, 2),
    (128, 2),
    (256, 2),
    (64, 3),
    (128, 3),
    (64, 8),
    (128, 8),
    (256, 8),
]
DRAWS = 100


def logits_of(N, K):
    rng = np.random.default_rng(N * 100 + K)
    return torch.from_numpy(2 * rng.normal(size=(N, K)) + 1.5 * (np.arange(K) == 0))  # leans to one class


def released(logits, K, rng):
    """q from 100 draws of u, each assigned by POT."""
    p = logits.softmax(1).numpy()
    N, q = len(p), np.zeros(p.shape)
    for _ in range(DRAWS):
        u = np.eye(K)[rng.integers(K, size=N)]
        cost = np.linalg.norm(p[:, None] - u[None], axis=2)
        q += (ot.emd(np.ones(N) / N, np.ones(N) / N, cost) * N) @ u / DRAWS
    return q


def reference(logits, K):
    """The exact expectation, or many draws; and the scatter of the reference itself."""
    found = expected_ot(logits, [1 / K] * K, tolerance=0.0012, rng=np.random.default_rng(99))
    return found.q.numpy(), float(found.stderr.max())


def measure(N, K, repeats):
    logits, target = logits_of(N, K), [1 / K] * K
    exact, scatter = reference(logits, K) if N * K <= 512 else (None, None)
    times, errors = {"ours": [], "released": []}, {"ours": [], "released": []}
    rng = np.random.default_rng(0)
    ways = {
        "ours": lambda: expected_ot(logits, target, rng=rng).q.numpy(),
        "released": lambda: released(logits, K, rng),
    }
    ways["ours"]()  # the first call loads what scipy puts off
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.perf_counter()
            q = way()
            times[name].append(1e3 * (time.perf_counter() - began))
            if exact is not None:
                errors[name].append(np.abs(q - exact).max())
    row = {"N": N, "K": K, "exact": expected_ot(logits, target).stderr.max().item() == 0}
    for name in ways:
        row[f"{name}_ms"] = round(statistics.median(times[name]), 3)
        row[f"{name}_error"] = round(statistics.median(errors[name]), 4) if errors[name] else None
    return {**row, "reference_stderr": scatter}


def shown(rows: list[dict]) -> str:
    """The table of all cases."""
    cells = []
    for r in rows:
        error = "exact" if r["exact"] else r["ours_error"]
        cells.append([f"{r['N']}, {r['K']}", r["ours_ms"], error, r["released_ms"], r["released_error"]])
    return table(["N images, K classes", "here, ms", "error", "100 draws of `ot.emd`, ms", "error"], cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    rows = [measure(N, K, options.repeats) for N, K in CASES]
    print(shown(rows))
    write(options.out, {"machine": where, "rows": rows})


if __name__ == "__main__":
    main()
