"""What scheduler_config.json says of the model is taken or refused, and what it says of a sampler is said."""

import logging
import shutil

import pytest

from fairref.bundle.scheduler import read_schedule
from fairref.bundle.stable_diffusion import load_stable_diffusion
from fairref.diffusion.schedule import Schedule
from fairref.errors import UserError
from fairref.progress import note

SD15 = {
    "_class_name": "PNDMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "steps_offset": 1,
}
OWN = {
    **SD15,
    "_class_name": "DPMSolverMultistepScheduler",
    "solver_order": 2,
    "timestep_spacing": "linspace",
}


@pytest.fixture
def notes(caplog):
    note.cache_clear()
    caplog.set_level(logging.WARNING, "fairref")
    return caplog


def test_fairrefs_own_sampler_needs_no_word(notes):
    assert read_schedule(OWN, "file") == Schedule() and not notes.messages
    assert read_schedule({**SD15, "beta_schedule": "linear"}, "file") == Schedule(kind="linear")


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistep", "PNDM", "DDIM", "EulerDiscrete", "LMSDiscrete", "UniPCMultistep", "DDPM", "Heun"],
)
def test_what_diffusers_saves_is_read(tiny_folder, tmp_path, notes, name):
    """In a whole folder; only its own sampler, with the defaults there, needs no word."""
    diffusers = pytest.importorskip("diffusers")
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    kind = getattr(diffusers, f"{name}Scheduler", None) or getattr(diffusers, f"{name}DiscreteScheduler")
    of_model = {k: v for k, v in SD15.items() if k not in ("_class_name", "steps_offset")}
    kind(**of_model).save_pretrained(copy / "scheduler")
    (copy / "model_index.json").unlink(missing_ok=True)
    assert load_stable_diffusion(copy).schedule == Schedule()
    assert [kind.__name__ in message for message in notes.messages] == [True] * (name != "DPMSolverMultistep")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"_class_name": "PNDMScheduler"}, "asks for PNDMScheduler; fairref draws by its own solver"),
        ({"use_karras_sigmas": True}, "asks for use_karras_sigmas = True"),
        ({"algorithm_type": "sde-dpmsolver++"}, "sde-dpmsolver"),
        ({"thresholding": True, "solver_order": 3}, "solver_order = 3, thresholding = True"),
        ({"timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
    ],
)
def test_another_sampler_is_said_in_one_line(notes, change, said):
    assert read_schedule({**OWN, **change}, "file") == Schedule()
    (message,) = notes.messages
    assert message.startswith("file: asks for ") and said in message


def test_the_pipeline_names_the_sampler(notes):
    read_schedule(OWN, "file", "EulerDiscreteScheduler")
    assert "asks for EulerDiscreteScheduler;" in notes.messages[0]


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"beta_schedule": "squaredcos_cap_v2"},
            "beta_schedule is 'squaredcos_cap_v2'; expected 'scaled_linear'",
        ),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'; expected 'epsilon'"),
        ({"prediction_type": None}, "prediction_type is None"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"num_train_timesteps": 0}, "num_train_timesteps 0"),
        (
            {"num_train_timesteps": 1e30},
            "num_train_timesteps = 1e\\+30, expected a whole number up to 100,000",
        ),
        ({"num_train_timesteps": "abc"}, "num_train_timesteps = 'abc'"),
        ({"beta_start": float("inf")}, "beta_start = inf, expected a number"),
        ({"beta_end": 1.5}, "1.5"),
        ({"beta_schedule": None}, "beta_schedule = None, expected a text"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "another kind of model, as SD-3 and Flux"),
        ({"_class_name": ["x"]}, "_class_name is"),
    ],
)
def test_a_schedule_it_does_not_have_is_refused(change, said):
    with pytest.raises(UserError, match="^file: .*" + said):
        read_schedule({**SD15, **change}, "file")


def test_a_missing_key_is_said():
    with pytest.raises(UserError, match=r"^file: lacks beta_end"):
        read_schedule({key: value for key, value in SD15.items() if key != "beta_end"}, "file")
