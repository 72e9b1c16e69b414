"""Images that any tool made, in a folder with one subfolder a prompt.

A subfolder's name is its prompt, unless FOLDER/prompts.json says another: {"pilot": "a photo of a pilot"}. Its images
are its PNG, JPEG and WebP files, in the order of their names; there may be more of one prompt than of another. Judges
see them as they see drawn images: as squares of the bundle's resolution.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fairref.bundle.loading import Bundle
from fairref.errors import UserError
from fairref.evaluation.confusion import Confusions, confusions
from fairref.evaluation.judging import EvaluationSettings, judge
from fairref.evaluation.labels import BY_HAND, Labels, on_labels, read_labels
from fairref.evaluation.parts import Evaluated, Report, correct, put_beside, report_on, with_confusions
from fairref.evaluation.statistics import JudgedImages
from fairref.fairness.attributes import wanted_target
from fairref.files.datasets import read_labelled
from fairref.files.images import read_square
from fairref.files.paths import expanded, read_json
from fairref.generation.drawing import Drawing, group_size
from fairref.processes import Processes
from fairref.progress import Progress, note

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
NO_IMAGE = re.compile(
    r"\.|seed\d+-grid\.png$"
)  # hidden files, and the grid that sample.py puts beside its images
PROMPTS = "prompts.json"
NOT_DRAWN = Drawing(0, 0.0)  # how these images were made is not known


@dataclass(frozen=True)
class ImageFolder:
    """The images of P prompts."""

    path: Path
    files: dict[str, tuple[Path, ...]]  # prompt -> its images
    names: dict[str, str]  # prompt -> its subfolder's name

    def labels(self, path: str | Path, classes: dict[str, tuple[str, ...]]) -> Labels:
        """Labels of some of its images, from a table. Raises UserError."""
        names = [[file.name for file in files] for files in self.files.values()]
        (labels,) = read_labels(path, classes, list(self.names.items()), names).values()
        return labels


def read_folder(path: str | Path) -> ImageFolder:
    """The prompts and image files of a folder. Raises UserError where a subfolder has none, or two have one prompt."""
    path = expanded(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give one with a subfolder of images for each prompt.")
    folders = {p.name: p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    if not folders:
        raise UserError(f"{path}: has no subfolder; put the images of each prompt into one of its own.")
    said = read_json(path / PROMPTS) if (path / PROMPTS).is_file() else {}
    for name, prompt in said.items():
        if name not in folders or not isinstance(prompt, str) or not prompt.strip():
            raise UserError(
                f"{path / PROMPTS}: found {name!r}: {prompt!r}; expected the name of a subfolder and its prompt."
            )
    prompts = {name: said.get(name, name) for name in folders}
    files, names, left_out = {}, {}, []
    for name, prompt in prompts.items():
        if prompt in files:
            raise UserError(
                f"{path}: {names[prompt]} and {name} have one prompt, {prompt!r}; put their images together."
            )
        names[prompt] = name
        shown = [p for p in sorted(folders[name].iterdir()) if not NO_IMAGE.match(p.name)]
        files[prompt] = tuple(p for p in shown if p.suffix.lower() in SUFFIXES)
        left_out += [p for p in shown if p not in files[prompt]]
        if not files[prompt]:
            raise UserError(f"{folders[name]}: has no image; expected {', '.join(SUFFIXES)} files.")
    if left_out:
        kinds = ", ".join(SUFFIXES)
        note(f"{path}: left out {len(left_out)} files that are no {kinds} images, such as {left_out[0].name}")
    return ImageFolder(path, files, names)


def judge_files(settings: EvaluationSettings, files: Sequence[Path], label: str) -> JudgedImages:
    """All of the images, judged; every process gets them all. Raises UserError for one that can't be read."""
    bundle, processes = settings.bundle, settings.processes
    size, mine = group_size(bundle), [files[i] for i in processes.part(len(files))]
    groups = [mine[start : start + size] for start in range(0, len(mine), size)]
    groups = groups or [
        files[:1]
    ]  # more processes than images: one says what there is of each, and is dropped
    rows = []
    with Progress(len(groups), label, processes.first) as progress:
        for group in groups:
            x = torch.stack([read_square(file, bundle.resolution) for file in group])
            rows.append(judge(settings, x.to(bundle.device)).tensors())
            progress.step()
    here = {name: torch.cat([of_group[name] for of_group in rows])[: len(mine)] for name in rows[0]}
    return JudgedImages.from_tensors(
        {name: processes.gather(of_mine, len(files)) for name, of_mine in here.items()}
    )


def evaluate_folder(
    settings: EvaluationSettings,
    folder: ImageFolder,
    before: ImageFolder | None = None,
    labels: Labels | None = None,
) -> Evaluated:
    """The report on a folder's images, of which some may have labels, and how like they are to those of the same prompt
    and name in another folder."""
    judged = _judged(settings, folder, list(folder.files.values()))
    about = {"concept": folder.path.name, "part": "images"}
    about |= dict.fromkeys(("steps", "guidance", "padding", "seed", "made"))  # unknown
    report = report_on(settings, judged, about, folder.names)
    classes = settings.target.classes
    by_hand = on_labels(labels, judged, classes, BY_HAND) if labels else {}
    with_confusions(report, by_hand, settings.confusions)
    correct(report, settings.target)
    if before is not None:
        pairs = _pairs(folder, before)
        after = [
            JudgedImages.from_tensors(
                {name: rows[[i for i, _ in shared]] for name, rows in s.tensors().items()}
            )
            for s, shared in zip(judged, pairs, strict=True)
            if shared
        ]
        originals = _judged(settings, before, [[file for _, file in shared] for shared in pairs if shared])
        report["pairs"] = sum(map(len, pairs))
        put_beside(report, after, originals, settings.target)
    return Evaluated(report, judged)


def _judged(settings, folder, files):
    """The images of each prompt, judged: lists of files by prompt."""
    whole = judge_files(settings, [file for of_prompt in files for file in of_prompt], folder.path.name)
    sizes = list(map(len, files))
    split = {name: rows.split(sizes) for name, rows in whole.tensors().items()}
    return [
        JudgedImages.from_tensors({name: rows[p] for name, rows in split.items()}) for p in range(len(files))
    ]


def _pairs(folder, before):
    """For each prompt of a folder: which of its images the other folder has, too, and the files there. Raises UserError
    where there is none."""
    pairs = []
    for prompt, files in folder.files.items():
        theirs = {file.name: file for file in before.files.get(prompt, ())}
        pairs.append([(i, theirs[file.name]) for i, file in enumerate(files) if file.name in theirs])
    if not any(pairs):
        raise UserError(
            f"{before.path}: has no image of the same prompt and name as {folder.path}; name both alike."
        )
    return pairs


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures whose classes are known."""

    files: list[Path]
    truth: dict[str, np.ndarray]  # attribute -> (n,) class indices
    source: str  # for reports

    @classmethod
    def read(
        cls, root: str | Path, classes: dict[str, tuple[str, ...]], first: bool = True
    ) -> "LabelledPictures":
        """Those of a folder (`files/datasets.py`); the `first` process says which are left out. Raises UserError."""
        found = read_labelled(root, classes)
        if found.bad and first:
            note(f"left out {len(found.bad)} of the labelled pictures, such as {found.bad[0]}")
        rows = found.parts["test"]
        labels = np.array([row.labels for row in rows])  # (n, A)
        truth = {name: labels[:, a] for a, name in enumerate(found.attributes)}
        return cls([row.file for row in rows], truth, f"labelled pictures of {expanded(root).name}")


def judge_labelled(settings: EvaluationSettings, pictures: LabelledPictures) -> Confusions:
    """Each judge's confusions on labelled pictures. Raises UserError for one that can't be read."""
    # features are of no use here
    settings = replace(settings, bundle=replace(settings.bundle, clip=None, dino=None))
    judged = judge_files(settings, pictures.files, "labelled pictures")
    return confusions(pictures.truth, judged.classes, settings.target.classes, pictures.source)


def folder_report(
    bundle: Bundle,
    images: str | Path,
    attr: str | None = "gender",
    *,
    target: str | Sequence[str] | None = None,
    before: str | Path | None = None,
    labelled: str | Path | None = None,
    labels: str | Path | None = None,
    processes: Processes = Processes(),
) -> Report:
    """How fair a folder's images are to a bundle's judges, ready for JSON; as `evaluation.evaluate`. Raises UserError.

    `before`: the folder of their originals, with the same prompts and names.
    """
    wanted = wanted_target(attr, target, bundle.attributes, str(bundle.path))
    settings = EvaluationSettings(bundle, wanted, NOT_DRAWN, processes=processes)
    folder, originals = read_folder(images), None if before is None else read_folder(before)
    known = None if labels is None else folder.labels(labels, wanted.classes)
    if originals is not None:
        _pairs(folder, originals)  # refused now
    if labelled is not None:
        pictures = LabelledPictures.read(labelled, wanted.classes, processes.first)
        settings = replace(settings, confusions=judge_labelled(settings, pictures))
    return evaluate_folder(settings, folder, originals, known).report
