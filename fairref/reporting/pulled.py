"""What pulled (`train.py --scores`): pictures of the longest and shortest gradients, and the shares of groups."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fairref.files.scores import Score, by_pull, most_and_least, picture_of, read_scores
from fairref.reporting import charts
from fairref.reporting.pictures import encoded
from fairref.reporting.run_files import Run
from fairref.reporting.shares import short_names
from fairref.reporting.tables import Chart, Table, attribute_words, chart, number, percent, sentence, short

SIDES = (64, 48, 32)  # pixels of a picture, the first that keeps the page small
PROMPTS = 12  # that a chart shows; the table has all


@dataclass(frozen=True)
class Thumb:
    """One picture, ready for a page."""

    data: str  # a data URI
    pull: str  # and its share of its iteration's
    seen: str  # the class that it shows, and the one that it is told
    prompt: str


@dataclass(frozen=True)
class Pulled:
    """What the section shows."""

    about: str
    rows: list[tuple[str, list[Thumb]]]
    charts: list[Chart]


def pulled(run: Run, budget: int) -> Pulled | None:
    """The section of a run; None where it recorded nothing. Raises UserError for a damaged file."""
    scores = read_scores(run.path)
    if not scores:
        return None
    blocks = most_and_least(by_pull(scores))
    data = encoded(
        {(s.iteration, n): picture_of(s, n) for of in blocks.values() for s, n in of}, SIDES, budget
    )
    rows = [(what, [_thumb(*image, data) for image in of]) for what, of in blocks.items() if of]
    neutral = [score for score in scores if not score.explicit and np.isfinite(score.pull).all()]
    shown = [_group_chart(neutral, name) for name in scores[0].classes] if neutral else []
    return Pulled(_about(scores), rows, [*shown, *_prompt_chart(neutral)])


def _about(scores):
    """What was recorded, and what is left out of the section."""
    explicit = sum(score.explicit for score in scores)
    broken = sum(not score.explicit and not np.isfinite(score.pull).all() for score in scores)
    about = [f"Recorded iterations: {len(scores)}, with {len(scores[0].pull)} pictures each."]
    if explicit:
        about.append(f"Left out here because the prompt names a class: {explicit}.")
    if broken:
        about.append(f"Left out here because the gradient was no number: {broken}.")
    if all(score.iteration == 0 for score in scores):
        about.append("This is the first iteration alone, before the adapter has changed anything.")
    return " ".join(about)


def _thumb(score, n, data):
    seen = "; ".join(_seen(score, name, n) for name in score.classes)
    pull = f"{score.pull[n]:.2g} ({percent(score.share[n])})"
    return Thumb(data.get((score.iteration, n), ""), pull, seen, short(score.prompt))


def _seen(score, name, n):
    """woman, told man .98."""
    classes, shown, told = score.classes[name], score.shown[name][n], score.target[name][n]
    sees = short(classes[shown]) if shown >= 0 else "no face"
    return (
        f"{sees}, told {short(classes[told])} {number(score.confidence[name][n])}"
        if told >= 0
        else f"{sees}, told nothing"
    )


def _group(score, name, n):
    """What a picture shows and whether it is told to change."""
    classes, shown, told = score.classes[name], score.shown[name][n], score.target[name][n]
    if shown < 0:
        return "no face"
    told_what = (
        "told nothing" if told < 0 else "told to stay" if told == shown else f"told {short(classes[told])}"
    )
    return f"{short(classes[shown])}, {told_what}"


def _group_chart(scores: Sequence[Score], name: str) -> Chart:
    """Of each group its share of the pictures and of the pull, the mean of the iterations' shares."""
    pictures, pull = Counter(), Counter()
    for score in scores:
        for n, share in enumerate(score.share):
            group = _group(score, name, n)
            pictures[group] += 1 / len(score.pull) / len(scores)
            pull[group] += share / len(scores)
    groups = sorted(pictures, key=lambda group: -pull[group])
    bars = {
        group: {"of the pictures": (pictures[group], None, None), "of the pull": (pull[group], None, None)}
        for group in groups
    }
    rows = [(group, percent(pictures[group]), percent(pull[group])) for group in groups]
    words = sentence(attribute_words(name))
    caption = (
        f"{words}: share of the pictures and of the pull, by what a picture shows and what it is told. Neutral prompts;"
        " the mean of the iterations' shares."
    )
    table = Table(f"{words}: who pulled", ("group", "of the pictures", "of the pull"), rows)
    return chart(
        caption,
        table,
        charts.bars,
        bars,
        "share",
        f"{words}: who pulled",
    )


def _prompt_chart(scores: Sequence[Score]) -> list[Chart]:
    """The share of all recorded pull that each prompt's pictures have. It takes no share within an iteration."""
    pull, pictures, iterations = Counter(), Counter(), Counter()
    for score in scores:
        pull[score.prompt] += float(score.pull.sum())
        pictures[score.prompt] += len(score.pull)
        iterations[score.prompt] += 1
    total, count = sum(pull.values()), sum(pictures.values())
    if len(pull) < 2 or not total:
        return []
    names, of_most = short_names(list(pull)), pull.most_common()
    shares = {prompt: (pictures[prompt] / count, value / total) for prompt, value in of_most}
    heads = ("of the pictures", "of the pull")
    bars = {
        names[prompt]: {head: (share, None, None) for head, share in zip(heads, shares[prompt], strict=True)}
        for prompt, _ in of_most[:PROMPTS]
    }
    rows = [(names[p], str(iterations[p]), *map(percent, shares[p])) for p, _ in of_most]
    caption = (
        "Share of each prompt's pictures in all that were recorded, and in their pull, before clipping and AdamW. One"
        " iteration of a prompt says little: its steps and its noise differ from another's."
    )
    caption += f" The first {PROMPTS} of {len(pull)}." if len(pull) > PROMPTS else ""
    table = Table("Share of the pull by prompt", ("prompt", "iterations", *heads), rows)
    return [chart(caption, table, charts.bars, bars, "share", "Which prompts pulled")]
