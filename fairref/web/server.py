"""The page as a server: what of gradio is open, how large a request may be, who may come in."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from fairref.errors import is_debugging
from fairref.web import shown
from fairref.web.page import need_gradio, page
from fairref.web.studio import Drawn, Studio

# What the page and its API need of gradio. All else that gradio serves is closed: files, uploads, proxies, streams.
OPEN = re.compile(
    r"/(?:(?:gradio_api/)?(?:config|theme\.css|info|app_id|startup-events|user|token|login_check)/?"
    r"|gradio_api/(?:queue/(?:join|data)|cancel|reset/?|heartbeat/\w+|(?:call|run|api)/\w+/?|call/\w+/\w+)"
    r"|login/?|logout|favicon\.ico|robots\.txt|manifest\.json|(?:static|assets|svelte)/[\w./-]+)?"
)
CALL = re.compile(r"/gradio_api/(?:queue/join|(?:call|run|api)/(\w+))/?")
MAX_SESSION = 64  # letters of a session's name
Asgi = Callable[..., Awaitable[None]]


class Guard:
    """In front of gradio: only what is OPEN is passed on, and no request that is too large or calls what is not there.

    `inputs`: of each function, by its name and by its number, how many values it takes.
    """

    def __init__(
        self, app: Asgi, limit: int, root_path: str = "", inputs: Mapping[str | int, int] | None = None
    ) -> None:
        self.app, self.limit, self.root_path, self.inputs = app, limit, root_path, inputs or {}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(self.root_path) or "/"  # a proxy may strip it or not
        if not OPEN.fullmatch(path) or ".." in path:
            await _answer(send, 404, "There is nothing here.")
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > self.limit:
                await _answer(send, 413, f"The request is larger than {self.limit} bytes.")
                return
        if refused := self._refused(path, body):
            await _answer(send, 400, refused)
            return
        await self.app({**scope, "path": path, "raw_path": path.encode()}, _replay(body, receive), send)

    def _refused(self, path, body):
        """What is wrong with a request, a sentence; what is no request at all gradio refuses itself."""
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return None
        if not isinstance(request, dict):
            return None
        # gradio keeps the name, whoever never comes back
        if len(str(request.get("session_hash", ""))) > MAX_SESSION:
            return f"session_hash is longer than {MAX_SESSION} letters."
        if not (call := CALL.fullmatch(path)):
            return None
        called = [of for of in (call[1], request.get("fn_index")) if of not in (None, "predict")]
        if not called or not all(isinstance(of, str | int) and of in self.inputs for of in called):
            return "There is no such function; expected draw or about."
        values = request.get("data")
        for of in called if isinstance(values, list) else ():
            if len(values) != self.inputs[of]:
                return f"data has {len(values)} values; {of} takes {self.inputs[of]}."
        return None


def _replay(body, receive):
    """A `receive` that gives the whole body first, and then what comes, as that the client has gone."""
    given = []

    async def again():
        if given:
            return await receive()
        given.append(True)
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send, status, sentence):
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})


def application(
    studio: Studio, example: Drawn, auth: Sequence[tuple[str, str]] = (), root_path: str = ""
) -> Asgi:
    """The whole as an ASGI application. Raises UserError."""
    gr = need_gradio()
    import fastapi

    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Base(**fonts).set(body_text_color_subdued="*neutral_600")  # gradio's own can't be read
    blocks = page(studio, example)
    forget(blocks, 2 * studio.limits.waiting)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        auth=list(auth) or None,
        root_path=root_path or None,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        blocked_paths=[str(Path("/"))],
        max_file_size=1,
        theme=theme,
        css=shown.CSS,
    )
    there = {key: fn for key, fn in blocks.fns.items() if fn.fn is not None}
    public = {fn.api_name: fn for fn in there.values() if fn.api_visibility == "public"}
    inputs = {name: len(fn.inputs) for name, fn in {**there, **public}.items()}
    app.add_middleware(Guard, limit=studio.limits.body, root_path=root_path, inputs=inputs)
    return app


def forget(blocks: object, sessions: int) -> None:
    """Of visitors who never fetch their results gradio keeps only the last ones'."""
    from gradio.utils import LRUCache

    for name in ("pending_messages_per_session", "pending_event_ids_session"):
        setattr(blocks._queue, name, LRUCache(sessions))


def run(app: Asgi, host: str, port: int, root_path: str = "") -> None:
    """Serves until Ctrl-C."""
    import uvicorn

    level = "info" if is_debugging() else "critical"  # open pages are cut off at the end, which is no fault
    uvicorn.run(
        app, host=host, port=port, log_level=level, proxy_headers=bool(root_path), timeout_graceful_shutdown=1
    )
