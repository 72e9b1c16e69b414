"""fairref serve: a page where a prompt is drawn by the original and by the fair model, side by side."""

import math
import os
import socket
from collections.abc import Sequence

from fairref.bundle.loading import load_bundle
from fairref.commands import cli
from fairref.errors import UserError
from fairref.generation.adapters import own_adapters, read_adapter
from fairref.processes import DTYPES, choose_device
from fairref.settings import MAX_COUNT
from fairref.web import server
from fairref.web.page import need_gradio
from fairref.web.studio import Studio
from fairref.web.view import Limits, read_view

EXAMPLE = "a photo of the face of a pilot, a person"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = cli.Parser(
        prog="fairref serve",
        description="Serve a page: a prompt's pictures by the original and by the fair model, from the same noise.",
        example="fairref serve --adapter runs/gender",
    )
    cli.add_common(parser)
    parser.add_argument(
        "--adapter",
        action="append",
        help="a run's folder or an adapter file; several are possible (None: those in the bundle's adapters/)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where to listen; 0.0.0.0: on all of the machine's networks"
    )
    parser.add_argument("--port", type=cli.whole(1, 65_535), default=7860, help="port to listen on")
    parser.add_argument(
        "--auth", action="append", metavar="NAME:PASSWORD", help="who may come in (None: everybody)"
    )
    parser.add_argument("--root-path", default="", help="path of the page behind a proxy, as /fairref")
    parser.add_argument("--example", default=EXAMPLE, help="prompt that a first visit shows")
    parser.add_argument(
        "--max-images", type=cli.whole(1, MAX_COUNT), default=8, help="pictures by each model, at most"
    )
    parser.add_argument(
        "--max-waiting", type=cli.whole(1, MAX_COUNT), default=32, help="requests that wait, at most"
    )
    parser.add_argument(
        "--max-seconds", type=cli.whole(1), default=300, help="of drawing, after which a request is stopped"
    )
    cli.add_any_base(parser)
    options = parser.parse_args(argv)
    auth = [_name_and_password(text) for text in options.auth or ()]
    root = options.root_path
    if root and (not root.startswith("/") or root.endswith("/")):
        raise UserError(f"--root-path is {root!r}; expected a path as /fairref.")
    _check_free(options.host, options.port)
    need_gradio()
    bundle = load_bundle(options.weights, choose_device(options.device), DTYPES[options.dtype or "float32"])
    limits = Limits(images=options.max_images, waiting=options.max_waiting, seconds=options.max_seconds)
    paths = options.adapter or own_adapters(bundle)
    studio = Studio(bundle, _named([read_adapter(path) for path in paths]), limits, options.any_base)
    *_, example = studio.draw(read_view({"prompt": options.example}, studio.default, limits), math.inf)
    app = server.application(studio, example, auth, root)
    host = {"127.0.0.1": "localhost", "::1": "localhost"}.get(options.host, options.host)
    print(f"http://{host}:{options.port}{f', behind a proxy at {root}' if root else ''}")
    print("Ctrl-C stops it", flush=True)
    server.run(app, options.host, options.port, root)


def _named(adapters):
    """Adapters by the names that visitors see: their folders', or their files'."""
    named = {}
    for adapter in adapters:
        file = adapter.file.absolute()
        name = file.parent.name if file.name == "adapter.safetensors" else file.stem
        names = (name, *(f"{name} ({k})" for k in range(2, len(named) + 2)))
        named[next(name for name in names if name not in named)] = adapter
    return named


def _name_and_password(text):
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise UserError("--auth is not NAME:PASSWORD; give both.")
    return name, password


def _check_free(host, port):
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.create_server(address[:2], family=family):
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise UserError(
            f"--host {host} --port {port}: can't listen there ({why}); give another one."
        ) from None
