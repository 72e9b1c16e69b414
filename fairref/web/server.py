"""The page as a server: what of gradio is open, how large a request may be, who may come in."""

import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from fairref.web import shown
from fairref.web.page import need_gradio, page
from fairref.web.studio import Drawn, Studio

# What the page and its API need of gradio. All else that gradio serves is closed: files, uploads, proxies, streams.
OPEN = re.compile(
    r"/(?:(?:gradio_api/)?(?:config|theme\.css|info|openapi\.json|app_id|startup-events|user|token|login_check)/?"
    r"|gradio_api/(?:queue/(?:join|data)|cancel|reset/?|heartbeat/\w+|(?:call|run|api)/\w+/?|call/\w+/\w+)"
    r"|login/?|logout|favicon\.ico|robots\.txt|manifest\.json|(?:static|assets|svelte)/[\w./-]+)?"
)
Asgi = Callable[..., Awaitable[None]]


class Guard:
    """In front of gradio: only what is OPEN is passed on, and no request that is too large."""

    def __init__(self, app: Asgi, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        """One request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
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
        await self.app(scope, _replay(body, receive), send)


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
    gr.mount_gradio_app(
        app,
        page(studio, example),
        path="/",
        auth=list(auth) or None,
        root_path=root_path or None,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api", "settings"],
        blocked_paths=[str(Path("/"))],
        max_file_size=1,
        theme=gr.themes.Base(**fonts),
        css=shown.CSS,
    )
    app.add_middleware(Guard, limit=studio.limits.body)
    return app


def run(app: Asgi, host: str, port: int, root_path: str = "") -> None:
    """Serves until Ctrl-C."""
    import uvicorn

    uvicorn.run(
        app,
        host=host,
        port=port,
        log_level="warning",
        proxy_headers=bool(root_path),
        timeout_graceful_shutdown=2,
    )
