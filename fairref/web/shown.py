"""A view's images as HTML: pairs of the same noise, counts with intervals, what the judge sees, downloads, the link.

All of it is inside the HTML, so the server serves no file and keeps none.
"""

import base64
import io
import zipfile
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from fairref.fairness.attributes import apparent
from fairref.web.studio import AFTER, BEFORE, Drawn, Seen

SWITCHES = {"judge": "what the judge sees", "others": "other attributes"}  # a checkbox's id -> what it shows
CSS = """
.fr{color:var(--body-text-color);display:flex;flex-direction:column;gap:.9rem;overflow-wrap:anywhere}
.fr p{margin:0;max-width:46rem}
.fr .note{border-left:3px solid #c77700;padding:.3rem .7rem;background:var(--background-fill-secondary)}
.fr .error{border-left:3px solid #c0392b;padding:.5rem .8rem;background:var(--background-fill-secondary)}
.fr .pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(var(--pair),100%),1fr));gap:.9rem}
.fr .pair{display:grid;grid-template-columns:1fr 1fr;gap:3px;margin:0}
.fr .one{position:relative;display:block;line-height:0}
.fr .one img{width:100%;border-radius:4px;display:block;image-rendering:auto}
.fr .one:focus-visible{outline:3px solid var(--color-accent);outline-offset:2px}
.fr .one svg{position:absolute;inset:0;width:100%;height:100%;display:none}
.fr .told{display:none;font-size:.78rem;line-height:1.35;color:var(--body-text-color-subdued);padding-top:.15rem}
body:has(#judge input:checked) .fr :is(.one svg,.told),body:has(#others input:checked) .fr .others{display:block}
.fr .others{display:none}
.fr .bars{display:grid;grid-template-columns:max-content minmax(6rem,1fr) max-content;
gap:.25rem .7rem;align-items:center;max-width:46rem;font-size:.88rem}
.fr .bars b{grid-column:1/-1;font-weight:600;margin-top:.3rem}
.fr .track{position:relative;height:.85rem;background:var(--background-fill-secondary);border-radius:3px}
.fr .track i{position:absolute;left:0;top:0;bottom:0;border-radius:3px;background:#d9734e}
.fr .track i.after{background:#3f6ee8}
.fr .track u{position:absolute;top:50%;height:0;border-top:2px solid var(--body-text-color);opacity:.75}
.fr .links{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;font-size:.92rem}
.fr a{color:var(--link-text-color);text-decoration:underline;padding:0}
.fr .doing{height:.5rem;border-radius:3px;background:var(--background-fill-secondary);max-width:46rem}
.fr .doing i{display:block;height:100%;border-radius:3px;background:var(--color-accent)}
.fr ul{margin:0;padding-left:1.1rem}
footer .divider{display:none}
@media (max-width:480px){.fr .bars{grid-template-columns:max-content 1fr}
.fr .bars .says{grid-column:1/-1;padding-bottom:.3rem}}
"""
NAMES = {BEFORE: "original", AFTER: "fair model"}


def shown(drawn: Drawn) -> str:
    """The whole result as HTML."""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in drawn.notes)
    n = len(drawn.sides[BEFORE].files)
    pairs = "".join(_pair(drawn, i) for i in range(n))
    heads = " and right: the fair model’s" if AFTER in drawn.sides else ""
    left = "Left: the original’s picture" if heads else "The original’s pictures"
    said = f"<p>{left}{heads}{', of the same noise' if heads else ''}. Click a picture to download it.</p>"
    links = (
        f'<a download="{_stem(drawn)}.zip" href="{_uri(zip_of(drawn), "application/zip")}">Download all (zip)</a>'
        f'<a class="view" href="?{escape(drawn.view.query())}">Link to this view</a>'
    )
    made_fair = [name for name in drawn.classes if name in drawn.made_fair] or list(drawn.classes)
    bars = "".join(_bars(drawn, name) for name in made_fair)
    others = "".join(_bars(drawn, name) for name in drawn.classes if name not in made_fair)
    bars += f'<div class="others">{others}</div>' if others else ""
    return (
        f'<div class="fr" style="--pair:{_pair_width(drawn)}rem">{notes}{said}'
        f'<div class="pairs">{pairs}</div>{_how_many(drawn)}{bars}'
        f'<div class="links">{links}</div></div>'
    )


def progress(done: int, total: int) -> str:
    """What stands there while it draws."""
    part = done / max(total, 1)
    return (
        f'<div class="fr"><p>Drawing: {done} of {total} steps</p><div class="doing" role="progressbar"'
        f' aria-valuenow="{100 * part:.0f}"><i style="width:{part:.0%}"></i></div></div>'
    )


def waiting() -> str:
    """What stands there until its turn comes."""
    return '<div class="fr"><p role="status">Waiting for its turn …</p></div>'


def told(sentence: str) -> str:
    """A sentence in the place of images, of no mistake."""
    return f'<div class="fr"><p role="status">{escape(sentence)}</p></div>'


def refused(sentence: str) -> str:
    """A mistake, in the place of images."""
    return f'<div class="fr"><p class="error" role="alert">{escape(sentence)}</p></div>'


def history_of(items: Sequence[Mapping[str, str]]) -> str:
    """The session's views, the last one first."""
    rows = "".join(f'<li><a href="?{escape(of["query"])}">{escape(of["says"])}</a></li>' for of in items)
    return f'<div class="fr"><ul>{rows}</ul></div>' if rows else '<div class="fr"><p>Nothing yet.</p></div>'


def summary(drawn: Drawn) -> dict[str, str]:
    """One line of the history: the prompt, and how many of the first class there were."""
    counts = []
    for name, classes in list(drawn.classes.items())[:1]:
        pair = [
            f"{counts[0]} of {sum(counts)}" if any(counts) else "no face"
            for counts in (side.seen[name].counts for side in drawn.sides.values())
        ]
        counts.append(f"{classes[0]}: {' → '.join(pair)}")
    view = drawn.view
    return {
        "query": view.query(),
        "says": f"{view.prompt[:80]} (seed {view.seed}) {'; '.join(counts)}".strip(),
    }


def as_json(drawn: Drawn) -> dict[str, object]:
    """What the API gives: images as base64 of PNG files, and what is seen of them."""
    sides = {
        label: {
            "images": [base64.b64encode(data).decode() for data in side.files],
            "boxes": side.boxes,
            "attributes": {
                name: {
                    "classes": [drawn.classes[name][k] if k >= 0 else None for k in seen.classes],
                    "probabilities": seen.probabilities,
                    "counts": dict(zip(drawn.classes[name], seen.counts, strict=True)),
                    "shares": dict(zip(drawn.classes[name], seen.shares, strict=True)),
                }
                for name, seen in side.seen.items()
            },
        }
        for label, side in drawn.sides.items()
    }
    return {"view": vars(drawn.view), "query": drawn.view.query(), "notes": drawn.notes, **sides}


def zip_of(drawn: Drawn) -> bytes:
    """All pictures as one file; equal pictures make equal bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as file:
        for label, side in drawn.sides.items():
            for i, content in enumerate(side.files):
                file.writestr(zipfile.ZipInfo(_file(drawn, label, i)), content)
    return data.getvalue()


def _pair_width(drawn):
    """Of two pictures, in rem: small ones are enlarged a little, large ones kept apart."""
    with Image.open(io.BytesIO(drawn.sides[BEFORE].files[0])) as image:
        return min(max(12, image.width / 8), 26)


def _stem(drawn):
    return f"seed{drawn.view.seed}"


def _file(drawn, label, i):
    return f"{_stem(drawn)}-{i:03d}-{label}.png"


def _uri(content, kind):
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _pair(drawn, i):
    cells = "".join(_one(drawn, label, i) for label in drawn.sides)
    return f'<figure class="pair">{cells}</figure>'


def _one(drawn, label, i):
    side, told = drawn.sides[label], []
    for name, seen in side.seen.items():
        k, p = seen.classes[i], seen.probabilities[i]
        told.append("no face" if k < 0 else f"{drawn.classes[name][k]} {p:.0%}")
    told = list(dict.fromkeys(told))  # no face: once
    words = f"{NAMES[label]}, picture {i + 1}: {', '.join(told) or drawn.view.prompt}"
    box = ""
    if side.boxes[i] is not None:
        x0, y0, x1, y1 = (100 * min(max(edge, 0), 1) for edge in side.boxes[i])
        edges = f'x="{x0:.1f}" y="{y0:.1f}" width="{x1 - x0:.1f}" height="{y1 - y0:.1f}" fill="none"'
        box = (
            '<svg viewBox="0 0 100 100" aria-hidden="true">'
            f'<rect {edges} stroke="#fff" stroke-width="2"/><rect {edges} stroke="#1f2328" stroke-width=".8"/></svg>'
        )
    href = "this.href=this.firstElementChild.src"  # the picture's own address: once is enough
    return (
        f'<div><a class="one" href="#" download="{_file(drawn, label, i)}" onclick="{href}">'
        f'<img src="{_uri(side.files[i], "image/png")}" alt="{escape(words)}">{box}</a>'
        + (f'<div class="told">{escape(", ".join(told))}</div></div>' if told else "</div>")
    )


def _how_many(drawn):
    """Which pictures are not among the counts below, and what stands there in brackets."""
    faceless = {
        label: next(iter(side.seen.values())).classes.count(-1)
        for label, side in drawn.sides.items()
        if side.seen
    }
    said = [
        f"{count} of {drawn.view.n} pictures of the {NAMES[label]} have no face and are not counted. "
        for label, count in faceless.items()
        if count
    ]
    brackets = "In brackets: 95\u00a0% intervals, which hold the accident of the noise alone."
    return f"<p>{''.join(said)}{brackets}</p>" if faceless else ""


def _bars(drawn, name):
    rows = [f"<b>{escape(apparent(name).replace('_', ' ').capitalize())}, as the judge sees it</b>"]
    for k, of_class in enumerate(drawn.classes[name]):
        for label, side in drawn.sides.items():
            rows.append(_bar(side.seen[name], k, f"{of_class}, {NAMES[label]}", label))
    return f'<div class="bars">{"".join(rows)}</div>'


def _bar(seen: Seen, k: int, what: str, label: str) -> str:
    value, low, high = seen.shares[k]
    n = sum(seen.counts)
    if value is None:
        return f'<span>{escape(what)}</span><span class="track"></span><span class="says">no face</span>'
    marks = (
        f'<i class="{"after" if label == AFTER else ""}" style="width:{value:.1%}"></i>'
        f'<u style="left:{low:.1%};width:{high - low:.1%}"></u>'
    )
    says = f"{seen.counts[k]} of {n}, {value:.0%} [{low:.0%} to {high:.0%}]"
    return f'<span>{escape(what)}</span><span class="track">{marks}</span><span class="says">{says}</span>'
