"""Values of a JSON file are of the types that settings ask for, or one sentence names the key."""

import inspect
from dataclasses import MISSING, dataclass, fields

import pytest

from fairref.bundle.configs import IMPLEMENTED, TOWERS
from fairref.bundle.scheduler import FIELDS, MODEL, SAMPLER
from fairref.bundle.typed import MAX_NUMBER, read_dataclass, read_values
from fairref.errors import UserError
from fairref.files.paths import refuse_mistyped
from fairref.files.tokenizer_files import KEYS
from fairref.nets.unet import UNetConfig
from fairref.nets.vae import VAEConfig

GOOD = {  # type -> values that are of it
    int: (0, -3, MAX_NUMBER),
    float: (0, 1, 0.5, -1e5),
    bool: (True, False),
    str: ("", "abc"),
    tuple[int, ...]: ([1], [1, 2, 3], []),
    tuple[float, float, float]: ([0.1, 1, 2],),
    tuple[str, ...]: (["a"],),
    int | tuple[int, ...]: (2, [1, 2]),
}
DEEP = [0]
for _ in range(100_000):
    DEEP = [DEEP]
NEVER = (
    None,
    {},
    {"a": 1},
    10**30,
    MAX_NUMBER + 1,
    float("inf"),
    float("nan"),
    1e30,
    [None],
    ["a", 1],
    [[1]],
    DEEP,
)


@pytest.mark.parametrize("kind", GOOD, ids=str)
def test_each_type_takes_its_values_and_no_other(kind):
    for value in GOOD[kind]:
        expected = tuple(value) if isinstance(value, list) else value
        assert read_values({"key": kind}, {"key": value, "more": None}, "file") == {"key": expected}
    others = [
        value
        for k in GOOD
        for value in GOOD[k]
        if all(value != v or type(value) is not type(v) for v in GOOD[kind])
    ]
    for value in [*NEVER, *(["abc", True, [1.5, 2]] if kind is int else others if kind is bool else [])]:
        with pytest.raises(UserError, match=r"^file: found key = .*, expected ") as caught:
            read_values({"key": kind}, {"key": value}, "file")
        assert len(str(caught.value)) < 300


@dataclass(frozen=True)
class Settings:
    width: int
    share: float = 0.5

    def __post_init__(self):
        if self.width > 9:
            raise UserError("width is too large.")


def test_a_dataclass_has_what_the_file_says():
    assert read_dataclass(Settings, {"width": 3, "unknown": None}, "file") == Settings(3)
    for d, message in (
        ({}, "found no key 'width'"),
        ({"width": 10}, "file: width is too large"),
        ({"widthh": 1}, "'widthh', expected 'width'"),
    ):
        with pytest.raises(UserError, match=message):
            read_dataclass(Settings, d, "file")


def known_keys():
    """Where settings are read -> (their names, the keys that diffusers' and transformers' own files have)."""
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")

    def parameters(cls):
        return set(inspect.signature(cls.__init__).parameters)

    schedulers = [cls for name, cls in vars(diffusers.schedulers).items() if name.endswith("Scheduler")]
    return {
        "unet": (
            [*(f.name for f in fields(UNetConfig)), "sample_size"],
            parameters(diffusers.UNet2DConditionModel),
        ),
        "vae": ([f.name for f in fields(VAEConfig)], parameters(diffusers.AutoencoderKL)),
        "text": ([f.name for f in fields(TOWERS["text"])], set(transformers.CLIPTextConfig().to_dict())),
        "vision": (
            [f.name for f in fields(TOWERS["vision"])],
            set(transformers.CLIPVisionConfig().to_dict()),
        ),
        "scheduler": ((*FIELDS, *MODEL, *SAMPLER), set().union(*map(parameters, schedulers))),
        "tokenizer": (
            KEYS,
            {"pad_token_id", "errors", "max_length", "name_or_path", "special_tokens_map_file"},
        ),
    }


def test_no_key_of_the_libraries_own_files_is_taken_for_mistyped():
    for names, keys in known_keys().values():
        for name in names:
            refuse_mistyped([name], dict.fromkeys(keys - {name} - set(names)), "file")


def test_a_key_that_is_absent_means_what_it_means_in_diffusers():
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")

    def defaults(cls):
        return {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items()}

    peers = {
        UNetConfig: defaults(diffusers.UNet2DConditionModel),
        VAEConfig: defaults(diffusers.AutoencoderKL),
        TOWERS["text"]: transformers.CLIPTextConfig().to_dict(),
        TOWERS["vision"]: transformers.CLIPVisionConfig().to_dict(),
    }
    for cls, peer in peers.items():
        ours = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        assert ours == {name: peer[name] for name in ours}
        others = {key: peer[key] for key in IMPLEMENTED[cls] if key in peer}
        assert all(
            value in IMPLEMENTED[cls][key]
            for key, value in others.items()
            if not isinstance(value, list | tuple)
        )
