"""Where each equation is: its claim, the code's lines, the tests that hold it, the page that derives it."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import fairref
from fairref.diffusion import gradient, model, sampler, solver
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.fairness import losses, metrics, threshold, transport
from fairref.verification import derivation
from fairref.verification.verify import all_checks

ROOT = Path(fairref.__file__).parent.parent
DERIVATION, METHOD = "docs/derivation.md", "docs/method.md"
TEST_DERIVATION, TEST_SOLVER, TEST_LOSSES = (
    f"tests/{name}.py"
    for name in ("diffusion/test_derivation", "diffusion/test_solver", "fairness/test_losses")
)
TEST_VERIFY = "tests/verification/test_verify.py"
TEST_THRESHOLD = "tests/fairness/test_threshold.py"
TEST_TRANSPORT, TEST_METRICS = "tests/fairness/test_transport.py", "tests/fairness/test_metrics.py"


class Place(NamedTuple):
    """Where an equation is computed, tested and explained."""

    code: tuple[Callable[..., object], ...]
    tests: tuple[str, ...]  # file::function
    page: str  # file#heading
    modes: tuple[str, ...] = ()  # rows of MODES, where an equation is a choice of what is kept


_TRANSPORT = Place(
    (transport.expected_ot, transport.joint_ot, transport.two_classes),
    (
        f"{TEST_TRANSPORT}::test_q_and_cost_are_those_of_the_definition",
        f"{TEST_TRANSPORT}::test_pot_finds_the_same_costs",
    ),
    f"{METHOD}#3-the-distributional-alignment-loss-eqs-4-to-6",
)
_WEIGHTS = Place(
    (gradient.A_t, gradient.C_i, gradient.geometric_mean),
    (f"{TEST_DERIVATION}::test_for_ancestral_sampling_k_is_minus_A_and_the_paper_standardises_exactly",),
    f"{DERIVATION}#which-weights",
    ("paper",),
)
_SUM = Place(
    (gradient.adjusted_gradient, model.GuidedModel),
    (
        f"{TEST_DERIVATION}::test_the_sum_of_vjps_is_algorithm_A1",
        f"{TEST_DERIVATION}::test_algorithm_A1_on_the_scheduler_of_diffusers",
    ),
    f"{DERIVATION}#step-6-one-vector-jacobian-product-a-step",
    ("paper",),
)
_PUBLISHED = Place(
    (gradient.exact_gradient,),
    ("tests/training/test_loop.py::test_a_published_gradient_is_autograd_through_its_literal_algorithm",),
    f"{DERIVATION}#step-7-other-published-gradients",
)
PLACES = {  # a check's equation -> where it is
    "eq 1": Place(
        (Schedule,),
        ("tests/diffusion/test_schedule.py::test_one_forward_step_after_another_is_the_jump_from_x_0",),
        f"{DERIVATION}#step-1-adding-noise-eq-1",
    ),
    **dict.fromkeys(
        ("eq 2", "eq 3"),
        Place(
            (solver.ancestral_table, solver.step, sampler.sample),
            (
                f"{TEST_SOLVER}::test_ancestral_sampling_is_eq_3",
                f"{TEST_SOLVER}::test_ancestral_sampling_is_that_of_diffusers",
            ),
            f"{DERIVATION}#step-2-taking-noise-away-eqs-2-3",
        ),
    ),
    "guidance": Place(
        (model.guide,),
        ("tests/diffusion/test_sampler.py::test_guide",),
        f"{DERIVATION}#step-2-taking-noise-away-eqs-2-3",
    ),
    "DPM-Solver++": Place(
        (solver.solver_table, solver.step),
        (
            f"{TEST_SOLVER}::test_dpm_solver_is_that_of_diffusers",
            f"{TEST_SOLVER}::test_second_order_convergence",
        ),
        f"{DERIVATION}#the-same-for-dpm-solver",
    ),
    "z_0": Place(
        (solver._with_totals,),
        (f"{TEST_SOLVER}::test_a_and_k_are_the_response_to_one_input_at_a_time",),
        f"{DERIVATION}#step-6-one-vector-jacobian-product-a-step",
    ),
    "eq 10": Place(
        (derivation.unrolled_z0, Schedule.A.func),
        (f"{TEST_DERIVATION}::test_eq_10_is_the_recursion_of_eq_3",),
        f"{DERIVATION}#step-3-unrolling-eq-10",
    ),
    "eq 9": Place(
        (derivation.coupling, derivation.gradient_paths, derivation.solver_coupling, gradient.exact_gradient),
        (
            f"{TEST_DERIVATION}::test_eq_9",
            f"{TEST_DERIVATION}::test_the_exact_gradient_is_autograd_through_the_loop",
            f"{TEST_DERIVATION}::test_the_exact_gradient_is_a_finite_difference",
        ),
        f"{DERIVATION}#step-4-the-exact-gradient-eq-9",
    ),
    "A_t, C_i": _WEIGHTS,
    "A_t = 1": _WEIGHTS._replace(modes=("solver", "paper")),
    "Algorithm A.1": _SUM,
    "B_t = I": Place(
        (gradient.adjusted_gradient,),
        (f"{TEST_DERIVATION}::test_the_adjusted_gradient_drops_the_coupling",),
        f"{DERIVATION}#step-5-the-adjusted-gradient",
    ),
    "subsampling": Place(
        (gradient.subsample,),
        (f"{TEST_DERIVATION}::test_a_subsample_of_steps_is_unbiased",),
        f"{DERIVATION}#step-6-one-vector-jacobian-product-a-step",
    ),
    "rows": Place(
        (derivation.gradient_matrix, derivation.importance),
        (f"{TEST_DERIVATION}::test_a_row_of_the_gradient_matrix_is_one_images_gradient",),
        f"{DERIVATION}#single-images",
    ),
    **{
        name: _PUBLISHED._replace(modes=(name,))
        for name in ("last:K", "random:K", "bernoulli", "couple:ALPHA")
    },
    "kappa": _PUBLISHED,
    "drtune:M": _PUBLISHED._replace(
        code=(gradient.adjusted_gradient, gradient.spread_steps, gradient.late_steps, solver.solver_table),
        modes=("drtune:M",),
    ),
    "how often": _PUBLISHED._replace(
        code=(gradient.spread_steps, gradient.late_steps),
        tests=(f"{TEST_VERIFY}::test_a_changed_gradient_mode_is_noticed",),
        modes=("random:K", "bernoulli", "drtune:M"),
    ),
    "eqs 4, 5": _TRANSPORT,
    "eq 6": Place(
        (losses.confident_targets, losses.align_loss),
        (f"{TEST_LOSSES}::test_align_loss_is_eq_6_with_its_gradient",),
        f"{METHOD}#3-the-distributional-alignment-loss-eqs-4-to-6",
    ),
    "eq 6, C": Place(
        (threshold.asked_to_change, threshold.pull_left, losses.leaving_targets),
        (
            f"{TEST_THRESHOLD}::test_who_is_asked_of_four_classes_is_what_each_count_vector_says",
            f"{TEST_THRESHOLD}::test_what_is_left_of_the_pull_is_the_slope_over_the_share",
        ),
        f"{METHOD}#3-the-distributional-alignment-loss-eqs-4-to-6",
    ),
    "eq 7": Place(
        (losses.image_loss,),
        (f"{TEST_LOSSES}::test_image_loss_is_eq_7_with_its_gradient",),
        f"{METHOD}#4-the-loss-that-keeps-the-picture-eq-7",
    ),
    "L_face": Place(
        (losses.face_loss, losses.nearest_faces, losses.face_references),
        (f"{TEST_LOSSES}::test_face_loss_is_one_minus_the_largest_cosine_with_its_gradient",),
        f"{METHOD}#5-faces",
    ),
    "bias(P)": Place(
        (metrics.bias,),
        (f"{TEST_METRICS}::test_bias_is_the_mean_difference_of_all_pairs",),
        f"{METHOD}#8-evaluation",
    ),
    "noise floor": Place(
        (metrics.noise_floor,),
        (f"{TEST_METRICS}::test_the_noise_floor_is_the_published_one",),
        f"{METHOD}#8-evaluation",
    ),
}
ALIASES = {  # names of the course, of gradient modes and of papers -> equations
    "alpha_bar": ["eq 1"],
    "sigma_t": ["eq 2", "eq 3"],
    "epsilon": ["guidance"],
    "z_0": ["eq 10", "z_0"],
    "b_t": ["eq 9"],
    "gradient": ["eq 9"],
    "exact": ["eq 9"],
    "k_i": ["z_0"],
    "w_i": ["A_t, C_i"],
    "adjusted": ["Algorithm A.1", "B_t = I"],
    "a.1": ["Algorithm A.1"],
    "algorithm a1": ["Algorithm A.1"],
    "paper": ["Algorithm A.1"],
    "solver": ["A_t = 1"],
    "none": ["B_t = I"],
    "draft": ["last:K"],
    "alignprop": ["random:K", "bernoulli"],
    "q": ["eqs 4, 5"],
    "l_align": ["eq 6"],
    "l_img": ["eq 7"],
}


def explain(name: str) -> str:
    """What is known of an equation, "eq 9" or "9", as text. Raises UserError, which lists the equations."""
    found = list(_named(name))
    if not found:
        near = get_close_matches(name.lower(), ALIASES | {of.lower(): of for of in PLACES})
        hint = f" near are {', '.join(map(repr, near))};" if near else ""
        known = ", ".join(map(repr, [*PLACES, *ALIASES]))
        raise UserError(f"--explain is '{name}';{hint} expected one of {known}.")
    return "\n\n".join(map(_text, found))


def _named(name) -> Iterator[str]:
    """The equations of a name or of its beginning; a number names all that have it, and stands for K, M or ALPHA."""
    wanted = " ".join(name.lower().split())
    exact = ALIASES.get(wanted) or [of for of in PLACES if wanted in (of.lower(), *of.lower().split(", "))]
    numbers = re.fullmatch(r"(?:eq(?:uation)?s?\.? ?)?\(?(\d+(?:(?:, ?| and )\d+)*)\)?", wanted)
    if numbers and not exact:
        asked = set(re.findall(r"\d+", numbers[1]))
        exact = [of for of in PLACES if of.startswith("eq") and asked & set(re.findall(r"\d+", of))]
    begin = re.sub(r":[\d.]+$", ":", wanted)  # last:5
    yield from exact or (of for of in PLACES if len(wanted) > 2 and of.lower().startswith(begin))


def _text(equation):
    place = PLACES[equation]
    checks = [check for check in all_checks() if check.equation == equation]
    lines = [equation, *(f"  claim   {check.claim}\n          against {check.against}" for check in checks)]
    lines += [f"  code    {lines_of(function)}" for function in place.code]
    lines += [f"  code    {lines_of_mode(mode)}" for mode in place.modes]
    lines += [f"  check   {lines_of(check.run)}" for check in checks]
    lines += [f"  test    {test}" for test in place.tests]
    return "\n".join([*lines, f"  page    {place.page}"])


def lines_of(function: Callable[..., object]) -> str:
    """Return "file:first-last name" of a function or class, the file as seen from the repository."""
    function = inspect.unwrap(function)  # what no_grad wraps
    source, first = inspect.getsourcelines(function)
    file = Path(inspect.getsourcefile(function)).relative_to(ROOT).as_posix()
    return f"{file}:{first}-{first + len(source) - 1} {function.__qualname__}"


def lines_of_mode(name: str) -> str:
    """The same of a row of MODES."""
    file = Path(inspect.getsourcefile(gradient))
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "MODES":
            rows = zip(node.value.keys, node.value.values, strict=True)
            first, last = next((key.lineno, row.end_lineno) for key, row in rows if key.value == name)
    return f'{file.relative_to(ROOT).as_posix()}:{first}-{last} MODES["{name}"]'
