"""scheduler_config.json of diffusers -> the noise schedule, and a word on the sampler that it asks for."""

import math
from collections.abc import Mapping

from fairref.bundle.typed import read_values, shown
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.files.paths import refuse_mistyped
from fairref.progress import note

SOLVER = "DPMSolverMultistepScheduler"  # what fairref draws with, in diffusers' words
FIELDS = {  # key -> (field of Schedule, its type)
    "num_train_timesteps": ("T", int),
    "beta_start": ("beta_start", float),
    "beta_end": ("beta_end", float),
    "beta_schedule": ("kind", str),
}
MODEL = {  # key that belongs to the model -> the values that are implemented
    "prediction_type": ("epsilon",),
    "trained_betas": (None,),
    "rescale_betas_zero_snr": (False, None),
    "use_flow_sigmas": (False, None),
}
SAMPLER = {  # key that only chooses how images are drawn -> what fairref does
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "solver_order": 2,
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
    "thresholding": False,
    "clip_sample": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
}


def read_schedule(d: Mapping[str, object], source: str, sampler: str | None = None) -> Schedule:
    """Return the schedule of a scheduler_config.json; `sampler` is the class that model_index.json names.

    What describes the model is taken or refused. What only chooses a sampler is said, for fairref has its own, which is
    diffusers' DPMSolverMultistepScheduler with its defaults. `source` names the file. Raises UserError.
    """
    refuse_mistyped((*FIELDS, *MODEL, *SAMPLER), d, source)
    sampler = sampler or d.get("_class_name") or SOLVER
    if not isinstance(sampler, str):
        raise UserError(f"{source}: _class_name is {shown(sampler)}; expected a scheduler of diffusers.")
    if "Flow" in sampler or "EDM" in sampler:
        raise UserError(
            f"{source}: {sampler} is a scheduler of another kind of model, as SD-3 and Flux are; expected one for"
            " Stable Diffusion 1.x."
        )
    for key, allowed in MODEL.items():
        value = d.get(key)
        if key in d and not any(type(value) is type(a) and value == a for a in allowed):
            raise UserError(
                f"{source}: {key} is {shown(value)}; expected {allowed[0]!r}: use weights that predict the noise, such"
                " as SD-1.5."
            )
    if missing := [key for key in FIELDS if key not in d]:
        raise UserError(f"{source}: lacks {', '.join(missing)}; expected all of {', '.join(FIELDS)}.")
    values = read_values({key: kind for key, (_, kind) in FIELDS.items()}, d, source)
    try:
        schedule = Schedule(**{FIELDS[key][0]: value for key, value in values.items()})
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    others = [
        f"{key} = {shown(d[key])}" for key, value in SAMPLER.items() if d.get(key, value) not in (value, None)
    ]
    if sampler != SOLVER:
        others.insert(0, sampler)
    if others:
        note(f"{source}: asks for {', '.join(others)}; fairref draws by its own solver, {SOLVER}'s defaults.")
    return schedule
