"""Expected optimal transport against brute force over permutations (eq 4) and label vectors (eq 5)."""

import itertools
import math

import numpy as np
import pytest
import torch

from fairref.fairness.losses import confident_targets
from fairref.fairness.transport import (
    assign,
    class_distance,
    every_assignment,
    expected_ot,
    joint_ot,
    two_classes,
)


def draw_logits(N, K, seed=0, scale=2.0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def by_definition(logits, target):
    """q and the cost of eqs 4 and 5 from all K^N label vectors u and all N! permutations σ of each."""
    p = logits.softmax(1).numpy()
    N, K = p.shape
    q, cost = np.zeros((N, K)), 0.0
    for labels in itertools.product(range(K), repeat=N):
        u = np.eye(K)[list(labels)]
        probability = math.prod(target[k] for k in labels)
        best = min(
            itertools.permutations(range(N)),
            key=lambda s: sum(np.linalg.norm(p[i] - u[s[i]]) for i in range(N)),
        )
        q += probability * u[list(best)]
        cost += probability * np.linalg.norm(p - u[list(best)], axis=1).sum() / N
    return q, cost


@pytest.mark.parametrize(
    ("N", "target", "scale"),
    [
        (1, (0.3, 0.7), 2),
        (2, (0.5, 0.5), 2),
        (5, (0.5, 0.5), 2),
        (6, (0.2, 0.8), 2),
        (1, (0.5, 0.2, 0.3), 2),
        (5, (0.5, 0.2, 0.3), 2),
        (5, (0.5, 0.2, 0.3), 8),  # near certainty, where the distance and the cross-entropy disagree
        (4, (0.1, 0.4, 0.2, 0.3), 2),
        (4, (0.0, 0.5, 0.0, 0.5), 2),
    ],
)
def test_q_and_cost_are_those_of_the_definition(N, target, scale):
    logits = draw_logits(N, len(target), seed=N, scale=scale)
    ot = expected_ot(logits, torch.tensor(target, dtype=torch.float64))
    q, cost = by_definition(logits, target)
    assert np.abs(ot.q.numpy() - q).max() < 1e-12
    assert abs(ot.cost - cost) < 1e-12
    assert (ot.stderr == 0).all()


@pytest.mark.parametrize("d", [0.5, 0.3, 1.0, 0.0])
@pytest.mark.parametrize("shift", [0.0, 60.0])
def test_the_closed_form_is_the_enumeration_for_two_classes(d, shift):
    """A third class that the target never asks for makes the general path solve the same problem.

    With a shift of 60 all p are 1.0: the distances tie, and the cross-entropy decides as the log-odds do.
    """
    N, never = 24, -60.0
    logits = draw_logits(N, 2, scale=3) + torch.tensor([shift, 0.0])
    closed = expected_ot(logits, [d, 1 - d])
    three = torch.cat([logits, torch.full((N, 1), never)], 1)
    general = expected_ot(three, [d, 1 - d, 0])
    assert (closed.q - general.q[:, :2]).abs().max() < 1e-12
    assert abs(closed.cost - general.cost) < 1e-12


def test_the_example_of_the_method():
    """docs/method.md §3."""
    p = torch.tensor([0.9, 0.7, 0.6, 0.2], dtype=torch.float64)
    q = expected_ot(torch.stack([p, 1 - p], 1).log(), [0.5, 0.5]).q
    torch.testing.assert_close(q[:, 0] * 16, torch.tensor([15.0, 11, 5, 1], dtype=torch.float64))
    y, confident = confident_targets(q, 0.8)
    assert confident.tolist() == [True, False, False, True] and (y[0], y[3]) == (0, 1)


def test_class_0_goes_to_the_largest_log_odds_for_class_0():
    ot = expected_ot(torch.tensor([[0.0, 3.0], [3.0, 0.0], [0.0, 1.0]]), [0.5, 0.5])
    # P(Binomial(3, ½) >= 1, 2, 3) = 7/8, 4/8, 1/8 for the ranks
    assert torch.allclose(ot.q[:, 0], torch.tensor([1 / 8, 7 / 8, 4 / 8], dtype=torch.float64))


@pytest.mark.parametrize(
    ("N", "target"),
    [(9, (0.5, 0.5)), (24, (0.1, 0.9)), (9, (0.5, 0.2, 0.3)), (7, (0.25,) * 4)],
)
def test_rows_sum_to_1_and_the_column_mean_is_the_target(N, target):
    q = expected_ot(draw_logits(N, len(target)), target).q
    assert (q.sum(1) - 1).abs().max() < 1e-12
    assert (q.mean(0) - torch.tensor(target, dtype=torch.float64)).abs().max() < 1e-12
    assert (q >= 0).all()


@pytest.mark.parametrize("K", [2, 3])
def test_saturated_probabilities_still_have_confident_targets(K):
    """All p are 1.0 in float64, yet the extremes of the ranking get targets with c near 1, not the mean."""
    logits = torch.zeros(24, K, dtype=torch.float32)
    logits[:, 0] = 50 + torch.arange(24)
    ot = expected_ot(logits, [1 / K] * K)
    assert (logits.double().softmax(1)[:, 0] == 1).all()
    assert len(ot.q.unique(dim=0)) == 24
    assert ot.q.amax(1).max() > 0.99
    assert (ot.q[1:, 0] > ot.q[:-1, 0]).all()  # the least certain image is the first to change class


def test_log_odds_rank_in_float64():
    logits = torch.tensor([[60.0, 0.0], [60.0, -1e-6], [60.0, 1e-6]])  # equal in float32
    q = expected_ot(logits, [0.5, 0.5]).q[:, 0]
    assert torch.allclose(q, torch.tensor([4 / 8, 7 / 8, 1 / 8], dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 3, 8])
def test_equal_logits_share_their_q(K):
    logits = draw_logits(6, K)
    logits[4] = logits[3] = logits[1]
    target = [1 / K] * K
    ot = expected_ot(logits, target)
    assert (ot.q[1] == ot.q[3]).all() and (ot.q[1] == ot.q[4]).all()
    assert (ot.q.mean(0) - 1 / K).abs().max() <= 3 * ot.stderr.max() + 1e-12
    same = expected_ot(torch.ones(5, K), target).q
    assert (same - 1 / K).abs().max() <= 0.03 if K == 8 else (same - 1 / K).abs().max() < 1e-12


def test_equal_log_odds_tie_whatever_the_logits():
    q = expected_ot(torch.tensor([[1.0, 0.0], [3.0, 2.0], [0.0, 5.0], [5.0, 0.0]]), [0.5, 0.5]).q
    assert q[0, 0] == q[1, 0]
    assert torch.allclose(q[0, 0], torch.tensor((11 / 16 + 5 / 16) / 2, dtype=torch.float64))


@pytest.mark.parametrize("K", [2, 4])
def test_the_order_of_the_images_does_not_matter(K):
    logits = draw_logits(7, K)
    logits[2] = logits[5]
    logits[:3] += torch.tensor([100.0] + [0.0] * (K - 1))  # saturated: costs tie exactly
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3))
    target = [0.4, 0.6] if K == 2 else [0.4, 0.3, 0.2, 0.1]
    assert torch.equal(expected_ot(logits[order], target).q, expected_ot(logits, target).q[order])


@pytest.mark.parametrize("K", [2, 4])
def test_a_mask_is_the_same_as_leaving_images_out(K):
    logits, target = draw_logits(8, K), torch.full((K,), 1 / K)
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1, 0], dtype=torch.bool)
    poisoned = logits.clone()
    poisoned[~mask] = float("nan")
    ot, kept = expected_ot(poisoned, target, mask), expected_ot(logits[mask], target)
    assert torch.equal(ot.q[mask], kept.q) and ot.cost == kept.cost
    assert (ot.q[~mask] == 0).all() and (ot.stderr == 0).all()


@pytest.mark.parametrize("K", [2, 4, 8])
def test_no_image_and_one_image(K):
    target = torch.arange(1.0, K + 1) / torch.arange(1.0, K + 1).sum()
    none = expected_ot(torch.zeros(0, K), target)
    assert none.q.shape == none.stderr.shape == (0, K) and none.cost == 0
    masked = expected_ot(torch.zeros(3, K), target, torch.zeros(3, dtype=torch.bool))
    assert (masked.q == 0).all() and masked.cost == 0
    one = expected_ot(draw_logits(1, K), target)  # q of one image is the target, whatever the image
    assert (one.q[0] - target.double()).abs().max() < 1e-6


def test_drawing_agrees_with_enumerating_within_its_standard_error():
    logits, target = draw_logits(12, 4), [0.4, 0.3, 0.2, 0.1]
    exact = expected_ot(logits, target)
    drawn = expected_ot(logits, target, exact_limit=0, tolerance=0.01, rng=np.random.default_rng(1))
    assert 0 < drawn.stderr.max() <= 0.01
    z = (drawn.q - exact.q).abs() / drawn.stderr.clamp(min=1e-3)
    assert z.max() < 4 and z.mean() > 0.05
    assert abs(drawn.cost - exact.cost) < 0.02


def test_the_standard_error_is_the_scatter_of_repeated_drawing():
    logits, target = draw_logits(6, 3), [0.5, 0.3, 0.2]
    runs = [
        expected_ot(logits, target, exact_limit=0, tolerance=0.03, rng=np.random.default_rng(seed))
        for seed in range(40)
    ]
    scatter = torch.stack([run.q for run in runs]).std(0)
    claimed = torch.stack([run.stderr for run in runs]).mean(0)
    big = claimed > 0.5 * claimed.max()
    assert (scatter[big] / claimed[big]).sub(1).abs().max() < 0.4


def test_a_class_that_was_drawn_never_or_always_has_the_error_of_the_rule_of_three():
    """Every class has a share here, so q lies between 0 and 1, and a drawn 0 or 1 misses it. 3 / M holds for all but
    5 % of such cells; the errors of the others are normal, and 4.5 of them too many for any cell."""
    logits, target = draw_logits(10, 3, seed=2, scale=4.0), [0.7, 0.2, 0.1]
    exact, outside, cells = expected_ot(logits, target), 0, 0
    assert ((exact.q > 0) & (exact.q < 1)).all()
    for seed in range(20):
        drawn = expected_ot(logits, target, exact_limit=0, tolerance=0.05, rng=np.random.default_rng(seed))
        error, edge = (drawn.q - exact.q).abs(), (drawn.q == 0) | (drawn.q == 1)
        assert (drawn.stderr[edge] == 3 / 500).all() and (error[edge] > 0).all()
        common = (exact.q > 0.05) & (exact.q < 0.95)
        assert (error[common] < 4.5 * drawn.stderr[common]).all()
        outside, cells = outside + int((error[edge] > drawn.stderr[edge]).sum()), cells + int(edge.sum())
    assert cells > 100 and outside <= 0.05 * cells


def test_the_rule_of_three_may_ask_for_more_draws_and_leaves_what_is_certain_alone():
    """A class with a share of 1e-7 is in none of the first thousand draws, but in some draw it would be."""
    logits = torch.tensor([[40.0 * n, 0.0, -60.0] for n in range(-3, 4)], dtype=torch.float64)
    rng = np.random.default_rng(0)
    ot = expected_ot(logits, [1e-7, 1 - 1e-7, 0], exact_limit=0, tolerance=0.004, rng=rng)
    assert (ot.q[:, 1] == 1).all() and (ot.q[:, 0] == 0).all()
    assert (ot.stderr[:, :2] == 3 / 1000).all()  # 500 draws have .006
    assert (ot.stderr[:, 2] == 0).all()  # the target never asks for it
    only = expected_ot(logits, [0.0, 1.0, 0.0], exact_limit=0)
    assert (only.stderr == 0).all() and (only.q[:, 1] == 1).all()
    pair = {"a": logits, "b": draw_logits(7, 2)}
    joint = joint_ot(pair, [[0.5, 0.0], [0.3, 0.0], [0.2, 0.0]], exact_limit=0)
    assert (joint["b"].stderr == 0).all() and (joint["b"].q[:, 0] == 1).all()
    assert (joint["a"].stderr > 0).all()


def test_a_fit_without_any_draw_off_it_is_no_certainty():
    """A class with N d of .05: most draws have it never or once, and then the counts alone say who gets it."""
    logits, target = draw_logits(10, 3, seed=1), [0.005, 0.4, 0.595]
    exact = expected_ot(logits, target)
    for seed in range(40):
        drawn = expected_ot(logits, target, exact_limit=0, tolerance=0.05, rng=np.random.default_rng(seed))
        off = (drawn.q - exact.q).abs()
        assert (off < 4.5 * drawn.stderr + 1e-12).all()


def test_drawing_without_a_generator_is_the_same_at_every_call():
    logits = draw_logits(12, 8)
    state = np.random.get_state()[1].copy()
    a, b = expected_ot(logits, [1 / 8] * 8), expected_ot(logits, [1 / 8] * 8)
    assert torch.equal(a.q, b.q) and a.stderr.max() > 0
    assert (np.random.get_state()[1] == state).all()


def test_the_cost_falls_to_the_chance_of_the_counts_as_the_batch_becomes_fair():
    skewed = torch.tensor([[5.0, 0.0]]).repeat(24, 1) + draw_logits(24, 2, scale=0.1)
    fair = torch.cat([skewed[:12], skewed[12:].flip(1)])
    costs = [expected_ot(logits, [0.5, 0.5]).cost for logits in (skewed, fair)]
    assert costs[0] > 0.65 and costs[1] < 0.15


@pytest.mark.parametrize("K", [2, 5])
def test_distances_are_accurate_near_certainty(K):
    logits = torch.tensor([[30.0] + [0.0] * (K - 1)], dtype=torch.float64).numpy()
    tail = math.exp(-30) / (1 + (K - 1) * math.exp(-30))
    expected = tail * math.sqrt((K - 1) ** 2 + (K - 1))
    assert class_distance(logits)[0, 0] == pytest.approx(expected, rel=1e-12, abs=0)
    p = draw_logits(3, K).softmax(1).numpy()
    direct = np.linalg.norm(p[:, None] - np.eye(K), axis=2)
    assert np.abs(class_distance(np.log(p)) - direct).max() < 1e-12


@pytest.mark.parametrize(
    ("N", "K", "scale"), [(7, 4, 2.0), (7, 4, 30.0), (3, 6, 2.0), (12, 3, 0.01), (5, 2, 2.0)]
)
def test_neighbouring_counts_share_their_work_and_each_is_cheapest(N, K, scale):
    cost = class_distance(draw_logits(N, K, scale=scale).numpy())
    cost[1] = cost[0]  # exact ties
    allowed = np.delete(np.arange(K), 1) if K > 3 else np.arange(K)
    assigned = every_assignment(cost, allowed).T
    counts = (assigned[:, :, None] == np.arange(K)).sum(1)
    k = len(allowed)
    assert len(np.unique(counts, axis=0)) == len(counts) == math.comb(N + k - 1, k - 1)
    assert set(np.unique(assigned)) <= set(allowed)
    for row, n in zip(assigned, counts, strict=True):
        best = cost[np.arange(N), assign(cost, n)].sum()
        assert cost[np.arange(N), row].sum() == pytest.approx(best, abs=1e-12)


def by_joint_definition(logits, target):
    """Eqs 4 and 5 for joint classes, by brute force: {name: q}, joint cost."""
    names, shape = list(logits), np.shape(target)
    p = [logits[name].softmax(1).numpy() for name in names]
    N = len(p[0])
    classes = list(itertools.product(*map(range, shape)))

    def distance(i, joint):
        return math.sqrt(sum(np.sum((p[a][i] - np.eye(shape[a])[k]) ** 2) for a, k in enumerate(joint)))

    q, cost = {name: np.zeros((N, k)) for name, k in zip(names, shape, strict=True)}, 0.0
    for labels in itertools.product(classes, repeat=N):
        probability = math.prod(np.asarray(target)[joint] for joint in labels)
        if probability:
            best = min(
                itertools.permutations(range(N)),
                key=lambda s: sum(distance(i, labels[s[i]]) for i in range(N)),
            )
            cost += probability * sum(distance(i, labels[best[i]]) for i in range(N)) / N
            for i in range(N):
                for name, k in zip(names, labels[best[i]], strict=True):
                    q[name][i, k] += probability
    return q, cost


@pytest.mark.parametrize(
    "target",
    [
        [[0.25, 0.25], [0.25, 0.25]],
        [[0.5, 0.1], [0.1, 0.3]],
        [[0.0, 0.6], [0.4, 0.0]],  # two joint classes without mass
    ],
)
def test_joint_classes_are_those_of_the_definition(target):
    logits = {"gender": draw_logits(4, 2, seed=1), "age": draw_logits(4, 2, seed=2)}
    found = joint_ot(logits, torch.tensor(target, dtype=torch.float64))
    q, cost = by_joint_definition(logits, target)
    for name in logits:
        assert np.abs(found[name].q.numpy() - q[name]).max() < 1e-12
        assert abs(found[name].cost - cost) < 1e-12


def test_a_conditional_target_holds_in_every_group():
    """Age 75/25 within every gender x race group, K = 16: the marginals are the target's."""
    gender, race, age = np.array([0.5, 0.5]), np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.75, 0.25])
    target = gender[:, None, None] * race[:, None] * age
    logits = {"gender": draw_logits(12, 2, 1), "race": draw_logits(12, 4, 2), "age": draw_logits(12, 2, 3)}
    found = joint_ot(logits, target)
    for name, share in (("gender", gender), ("race", race), ("age", age)):
        ot = found[name]
        assert (ot.q.sum(1) - 1).abs().max() < 1e-12 and 0 < ot.stderr.max() <= 0.01
        # the mean over images is the mean of the drawn counts: its error is at most that of an image
        assert (ot.q.mean(0) - torch.from_numpy(share)).abs().max() < 4 * ot.stderr.max()


def test_the_marginals_of_a_product_target_are_not_those_of_each_alone():
    """A joint assignment weighs the attributes against each other: it may cost one to gain the other."""
    logits = {"a": draw_logits(6, 2, seed=5), "b": draw_logits(6, 2, seed=6)}
    joint = joint_ot(logits, torch.full((2, 2), 0.25))
    alone = expected_ot(logits["a"], [0.5, 0.5])
    assert (joint["a"].q - alone.q).abs().max() > 0.01
    assert (joint["a"].q.mean(0) - 0.5).abs().max() < 1e-12


def test_an_attribute_that_is_the_same_in_all_images_changes_nothing():
    """Its distances add the same to every image's cost of a class; where D has one class only, exactly."""
    logits = draw_logits(8, 3)
    target = torch.tensor([0.5, 0.3, 0.2])
    both = joint_ot(
        {"a": logits, "b": torch.tensor([[50.0, 0.0]]).repeat(8, 1)}, torch.stack([target, 0 * target], 1)
    )
    assert (both["a"].q - expected_ot(logits, target).q).abs().max() < 1e-12
    assert (both["b"].q[:, 0] - 1).abs().max() < 1e-12


@pytest.mark.parametrize(("N", "K"), [(8, 2), (12, 3), (20, 4)])
def test_pot_finds_the_same_costs(N, K):
    pot = pytest.importorskip("ot")
    logits = draw_logits(N, K, seed=3)
    cost, rng = class_distance(logits.numpy()), np.random.default_rng(0)
    target = np.full(K, 1 / K)
    for n in rng.multinomial(N, target, 20):
        plan = pot.emd(np.full(N, 1 / N), n / N, cost)
        ours = cost[np.arange(N), assign(cost, n)].mean()
        assert ours == pytest.approx((plan * cost).sum(), abs=1e-12)
    every = every_assignment(cost, np.arange(K)).T
    for row in every[:: max(1, len(every) // 40)]:
        n = np.bincount(row, minlength=K)
        value = pot.emd2(np.full(N, 1 / N), n / N, cost)
        assert cost[np.arange(N), row].mean() == pytest.approx(float(value), abs=1e-12)


@pytest.mark.parametrize("exact_limit", [0, 1000])
def test_a_target_in_float32_sums_to_1_only_nearly(exact_limit):
    target = torch.tensor([0.50000018, 0.5, 0.0])
    ot = expected_ot(draw_logits(4, 3), target, exact_limit=exact_limit)
    assert (ot.q.sum(1) - 1).abs().max() < 1e-12 and (ot.q[:, 2] == 0).all()


def test_two_classes_repeats_rows_by_their_size():
    once = two_classes(
        np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]), np.array([1, 1, 1]), np.array([0.5, 0.5])
    )
    grouped = two_classes(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([2, 1]), np.array([0.5, 0.5]))
    assert np.array_equal(once[[0, 2]], grouped)


def test_the_arguments_are_not_changed_and_gradients_do_not_enter():
    logits = draw_logits(5, 3).requires_grad_()
    before = logits.detach().clone()
    target = torch.tensor([0.2, 0.3, 0.5])
    ot = expected_ot(logits, target)
    assert not ot.q.requires_grad and ot.q.dtype == torch.float64
    assert torch.equal(logits, before) and torch.equal(target, torch.tensor([0.2, 0.3, 0.5]))


@pytest.mark.parametrize(
    ("logits", "target", "mask", "said"),
    [
        (torch.zeros(3, 2), [0.5, 0.6], None, "sum to 1"),
        (torch.zeros(3, 2), [1.5, -0.5], None, "no distribution"),
        (torch.zeros(3, 2), [0.5, float("nan")], None, "no distribution"),
        (torch.zeros(3, 2), [0.2, 0.3, 0.5], None, "the target is"),
        (torch.zeros(3), [0.2, 0.3, 0.5], None, "expected"),
        (torch.zeros(3, 1), [1.0], None, "K > 1"),
        (torch.zeros(3, 2), [0.5, 0.5], torch.ones(2, dtype=torch.bool), "mask is"),
        (torch.zeros(3, 2), [0.5, 0.5], torch.ones(3), "mask is"),
        (torch.full((3, 2), float("inf")), [0.5, 0.5], None, "finite"),
    ],
)
def test_wrong_arguments_are_refused(logits, target, mask, said):
    with pytest.raises(ValueError, match=said):
        expected_ot(logits, target, mask)
