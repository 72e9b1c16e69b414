"""An adapter as a Hugging Face Space: a folder with the page of `fairref serve`, which runs on the hub's machines.

The Space holds fairref itself, as a wheel. A base model that is on the hub is only named: the Space's host fetches it.
The small bundle is inside the wheel.
"""

import hashlib
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import fairref
from fairref.bundle.loading import DEFAULT, load_bundle
from fairref.errors import UserError
from fairref.exchange.card import environment
from fairref.exchange.exported import Export
from fairref.generation.adapters import save_adapter
from fairref.nets.unet import SD15

SD15_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # on the hub
BASE_FILES = [
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "*/*.safetensors",
]  # no checkpoint beside the folders
NOT_NEEDED = ["safety_checker/*", "*.fp16.*", "*.non_ema.*"]
REQUIREMENTS = (
    "torch>=2.6,<2.14",
    "numpy>=1.26",
    "scipy>=1.11",
    "pillow>=10.1",
    "safetensors>=0.4.3",
    "tokenizers>=0.21",
)
GRADIO = "6.31.0"  # what the page was tried with
ADAPTER = "adapter.safetensors"
LARGE_FILES = "*.whl filter=lfs diff=lfs merge=lfs -text\n*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


def to_space(export: Export) -> None:
    """Writes the Space; the adapter is in ADAPTER. Raises UserError where its host would not find the base."""
    is_sd15 = export.bundle.unet.config == SD15
    own = not is_sd15 and export.bundle.fingerprints == load_bundle(DEFAULT).fingerprints
    if own and export.hub_id:
        raise UserError(f"{export.bundle.path}: goes into the Space itself; leave out --hub-id.")
    if not own and not is_sd15:
        raise UserError(
            f"{export.bundle.path}: is neither Stable Diffusion 1.5 nor {DEFAULT}; a Space can't get it from the hub."
        )
    base, folder, adapter = "" if own else export.hub_id or SD15_ID, export.folder, export.adapter
    facts = {
        "export": export,
        "base": base,
        "wheel": write_wheel(folder, own),
        "adapter": ADAPTER,
        "classes": list(adapter.info.get("classes", {})),
        "gradio": GRADIO,
        "licence": "creativeml-openrail-m" if base else "mit",
        "any_base": export.any_base,
        "files": BASE_FILES,
        "not_needed": NOT_NEEDED,
    }
    about = {key: value for key, value in adapter.info.items() if key != "format"}
    save_adapter(folder / ADAPTER, adapter.tensors, about, adapter.info["format"])
    templates = environment()
    texts = {
        name: templates.get_template(f"space_{name}.jinja").render(facts) for name in ("README.md", "app.py")
    }
    texts |= {"requirements.txt": "\n".join(REQUIREMENTS) + "\n", ".gitattributes": LARGE_FILES}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _licence(root):
    """Beside the package of a checkout, or where pip puts it."""
    installed = sorted(root.glob("fairref-*.dist-info/**/LICENSE"))
    return next(path for path in [root / "LICENSE", *installed] if path.is_file())


def write_wheel(folder: Path, with_bundle: bool) -> str:
    """Writes this fairref as a wheel -> its name. `with_bundle`: with the small bundle in it."""
    package = Path(fairref.__file__).parent
    held = {path: f"fairref/{path.relative_to(package).as_posix()}" for path in sorted(package.rglob("*"))}
    weights = next((p for p in (package.parent / "weights", package / "weights") if p.is_dir()), None)
    files = {name: path for path, name in held.items() if not name.startswith("fairref/weights/")}
    for bundle in ("emoji", "mtcnn") if with_bundle and weights else ():
        for path in sorted((weights / bundle).rglob("*")):
            files[f"fairref/weights/{path.relative_to(weights).as_posix()}"] = path
    version = fairref.__version__
    about = f"fairref-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {row}\n" for row in REQUIREMENTS)
    texts = {
        f"{about}/METADATA": f"Metadata-Version: 2.4\nName: fairref\nVersion: {version}\n"
        f"License-Expression: MIT\nLicense-File: LICENSE\n{needs}",
        f"{about}/licenses/LICENSE": _licence(package.parent).read_text(encoding="utf-8"),
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: fairref\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    name = f"fairref-{version}-py3-none-any.whl"
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as wheel:
        record = []
        content = {
            key: path.read_bytes()
            for key, path in files.items()
            if path.is_file() and "__pycache__" not in key
        }
        for key, data in {**content, **{key: text.encode() for key, text in texts.items()}}.items():
            wheel.writestr(zipfile.ZipInfo(key), data, zipfile.ZIP_DEFLATED)
            digest = urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{key},sha256={digest},{len(data)}")
        wheel.writestr(zipfile.ZipInfo(f"{about}/RECORD"), "\n".join([*record, f"{about}/RECORD,,"]) + "\n")
    return name
