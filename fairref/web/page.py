"""The page and its API, in gradio: fields -> a view -> the studio, one request at a time."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import ModuleType
from urllib.parse import parse_qsl, urlencode

from fairref.errors import UserError
from fairref.web import shown
from fairref.web.studio import Drawn, Studio
from fairref.web.view import MAX_GUIDANCE, MAX_SEED, View, read_view

FIELDS = ("prompt", "negative", "seed", "n", "guidance", "steps", "adapter", "strength")
MAX_HISTORY = 30
MAX_SESSIONS = 100  # whose state gradio keeps: each call of the API is one
FULL, CANCELLED = "The queue is full; try again in a while.", "Cancelled."
INTRO = """# fairref
Type a prompt. The original model and the fair one draw it from the same noise. The judge says what a picture looks
like; nobody's gender, age or skin tone is known here, and the judge errs.
"""
# Enter presses the button, which does nothing while it is disabled
PRESS = "() => document.querySelector('#draw').click()"
# the address bar becomes the link to what is shown; the page is not loaded anew
TO_LINK = "(query) => { if (query) history.replaceState(null, '', '?' + query); }"


def need_gradio() -> ModuleType:
    """gradio. Raises UserError where it is missing."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported
    try:
        import gradio
    except ImportError:
        raise UserError('fairref serve needs gradio; install it with pip install -e ".[web]".') from None
    return gradio


def page(studio: Studio, example: Drawn) -> object:
    """The page, gradio's Blocks. A first visit shows the example, a link what it asks for. Raises UserError."""
    gr = need_gradio()
    with gr.Blocks(title="fairref", analytics_enabled=False, fill_width=True) as blocks:
        gr.Markdown(INTRO)
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=280):
                fields = _fields(studio)
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", elem_id="draw")
                    stop = gr.Button("Cancel", interactive=False)
            with gr.Column(scale=5, min_width=300):
                with gr.Row():  # outside of what each drawing replaces; the second needs a second attribute
                    for k, (name, what) in enumerate(shown.SWITCHES.items()):
                        gr.Checkbox(label=f"show {what}", visible=len(studio.classes) > k, elem_id=name)
                out = gr.HTML(shown.shown(example))
                with gr.Accordion("History of this browser", open=False):
                    listed, clear = gr.HTML(shown.history_of([])), gr.Button("Clear")
        history = gr.BrowserState([], storage_key="fairref", secret="fairref")
        _wire(studio, blocks, example, fields, (go, stop, clear), (out, listed, history))
        _api(studio)
    blocks.state_session_capacity = MAX_SESSIONS
    blocks.queue(max_size=studio.limits.waiting, default_concurrency_limit=1, api_open=False)
    return blocks


def _fields(studio):
    """One component for each of FIELDS."""
    gr = need_gradio()
    default, limits = studio.default, studio.limits
    names = list(studio.adapters)
    prompt = gr.Textbox(label="Prompt", lines=1, max_lines=1, max_length=limits.letters, elem_id="prompt")
    with gr.Row():
        seed = gr.Number(default.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100)
        many = limits.images > 1
        n = gr.Slider(
            1, max(limits.images, 2), default.n, step=1, label="Pictures of each model", visible=many
        )
    adapter = gr.Dropdown(names, value=default.adapter or None, label="Fair model", visible=bool(names))
    strength = gr.Slider(0, 1.5, 1.0, step=0.05, label="Its strength", visible=bool(names))
    with gr.Accordion("More settings", open=False):
        negative = gr.Textbox(label="Negative prompt", max_length=limits.letters)
        guidance = gr.Slider(0, MAX_GUIDANCE, default.guidance, step=0.1, label="Guidance scale")
        steps = gr.Slider(1, limits.steps, default.steps, step=1, label="Steps")
    return [prompt, negative, seed, n, guidance, steps, adapter, strength]


def _wire(studio, blocks, example, fields, buttons, places):
    """What happens when. A request first shows that it waits, then it draws in its turn, then it is remembered."""
    gr = need_gradio()
    go, stop, clear = buttons
    out, listed, history = places
    # of what is shown; a link that is to be drawn; why a drawing ended before it was done
    query, line, asked, why = (gr.Textbox(visible=False) for _ in range(4))

    def arrive(request: gr.Request):
        """The fields as a link has them; with one it is drawn, for `asked` changes."""
        values = {name: value for name, value in request.query_params.items() if name in FIELDS}
        view = what_can_be(studio, example.view, values)
        shown_fields = [values.get("prompt", view.prompt), *(getattr(view, name) for name in FIELDS[1:])]
        return [*shown_fields, urlencode(values) if values else gr.skip()]

    def begin():
        return shown.waiting(), "", "", gr.update(interactive=False), gr.update(interactive=True)

    def ask(*values):
        yield from _drawing(studio, dict(zip(FIELDS, values, strict=True)))

    def ask_link(asked):
        values = dict(parse_qsl(str(asked), keep_blank_values=True))
        yield from _drawing(studio, {**vars(example.view), **values})

    def remember(query, line, history):
        history = with_view(history, query, line)
        return history, shown.history_of(history), gr.update(interactive=True), gr.update(interactive=False)

    quiet = {"api_visibility": "private", "show_progress": "hidden", "queue": False}
    in_turn = {
        "concurrency_limit": 1,
        "concurrency_id": "draw",
        "api_visibility": "private",
        "show_progress": "hidden",
    }
    blocks.load(arrive, None, [*fields, asked], **quiet)
    blocks.load(lambda history: shown.history_of(with_view(history)), history, listed, **quiet)
    clear.click(lambda: ([], shown.history_of([])), None, [history, listed], **quiet)
    cancelled = []
    fields[0].submit(None, js=PRESS)
    for trigger, draw, given in ((go.click, ask, fields), (asked.change, ask_link, asked)):
        drawn = trigger(begin, None, [out, query, why, go, stop], **quiet).then(
            draw, given, [out, query, line], preprocess=False, **in_turn
        )
        # it never began, or it was cancelled: what fails while it draws is said there
        drawn.failure(lambda why: shown.told(why) if why else shown.refused(FULL), why, out, **quiet)
        drawn.then(remember, [query, line, history], [history, listed, go, stop], **quiet).then(
            None, query, None, js=TO_LINK
        )
        cancelled.append(drawn)
    stop.click(lambda: CANCELLED, None, why, cancels=cancelled, **quiet)


def what_can_be(studio: Studio, view: View, values: Mapping[str, object]) -> View:
    """The view with those of the values that can be; what can't be is said when it is drawn."""
    for name, value in values.items():
        with suppress(UserError):
            new = read_view({**vars(view), name: value}, studio.default, studio.limits)
            view = new if new.adapter in ("", *studio.adapters) else view
    return view


def with_view(history: object, query: str = "", line: str = "") -> list[dict[str, str]]:
    """The history, the browser's own to keep, with a view as its first one; no view stands there twice."""
    new = [{"query": query, "says": line}] if query else []
    kept = (
        [of for of in history if _is_view(of) and of["query"] != query] if isinstance(history, list) else []
    )
    return [*new, *kept][:MAX_HISTORY]


def _is_view(of):
    return isinstance(of, dict) and all(isinstance(of.get(name), str) for name in ("query", "says"))


def _drawing(studio: Studio, values: dict[str, object]) -> Iterator[tuple[str, str, str]]:
    """Progress, then the images or a sentence: (HTML, the link's query, a line for the history)."""
    try:
        for step in studio.draw(read_view(values, studio.default, studio.limits)):
            if not isinstance(step, Drawn):
                yield shown.progress(*step), "", ""
        line = shown.summary(step)
        yield shown.shown(step), line["query"], line["says"]
    except UserError as error:
        yield shown.refused(str(error)), "", ""


def _api(studio):
    """`/draw` for programs: the same settings, JSON back."""
    gr = need_gradio()

    def draw(
        prompt: str,
        negative: str = "",
        seed: int = 0,
        n: int | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        adapter: str = "",
        strength: float = 1.0,
    ) -> Iterator[dict]:
        """Images of a prompt by the original and the fair model, from the same noise, and what the judge sees.

        Before the result comes {"progress": [steps done, all steps]}.
        """
        values = dict(
            zip(FIELDS, (prompt, negative, seed, n, guidance, steps, adapter, strength), strict=True)
        )
        try:
            for step in studio.draw(read_view(values, studio.default, studio.limits)):
                # between two steps a client that has gone frees its place
                yield shown.as_json(step) if isinstance(step, Drawn) else {"progress": list(step)}
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def adapters() -> dict:
        """The names of the fair models, the classes that the judge tells, and the limits of a request."""
        return {"adapters": list(studio.adapters), "classes": studio.classes, "limits": vars(studio.limits)}

    gr.api(draw, api_name="draw", concurrency_limit=1, concurrency_id="draw")
    gr.api(adapters, api_name="about", queue=False)
