"""Load on `fairref serve`: visitors who draw at the same time. None is lost, none gets another's pictures.

    python tests/benchmarks/serving.py [--visitors 20] [--requests 10] [--port 7900]

Each visitor asks for prompts and seeds of its own through the JSON API, one after the other; every reply's settings
must be those that were asked for, and its pictures those that the library draws of them. The server's memory after the
20th and after the last request is compared. At the end some visitors leave in the middle of a long request, and the
server is killed (-9) and started again. Prints one line a check; exits with 1 where one fails.
"""

import argparse
import base64
import http.client
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent))
from measure import ROOT

from fairref.bundle.loading import load_bundle
from fairref.files.images import to_image
from fairref.generation.adapters import load_adapter
from fairref.generation.sampling import SampleSettings, sample_tensor

WHO = ("pilot", "nurse", "teacher", "farmer", "judge", "welder", "dancer", "cook")
N, STEPS = 1, 4  # images by each model, and their steps: enough to tell one request from another
LARGE = ("a photo of a person", "", 0, 8, 2.5, 100, "gender", 1.0)  # a request that takes long
PATIENCE = 3600  # seconds for one answer


class Server:
    """`fairref serve` on the small bundle."""

    def __init__(self, port: int, waiting: int) -> None:
        self.port = port
        argv = [
            "-m",
            "fairref",
            "serve",
            "--port",
            str(port),
            "--max-waiting",
            str(waiting),
            "--device",
            "cpu",
        ]
        self.process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
        while self.process.poll() is None:
            try:
                self.ask("GET", "/config")
                return
            except OSError:
                time.sleep(0.3)
        raise SystemExit("the server did not start")

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, bytes]:
        """Status and content of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        headers = {"Content-Type": "application/json"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def draw(self, *values: object) -> dict:
        """The API's result for these settings. Raises RuntimeError with what the server said instead."""
        status, content = self.ask("POST", "/gradio_api/call/draw", {"data": list(values)})
        if status != 200:
            raise RuntimeError(content.decode(errors="replace"))
        event = json.loads(content)["event_id"]
        _, content = self.ask("GET", f"/gradio_api/call/draw/{event}")
        *_, last = content.decode().strip().split("event: ")
        kind, data = last.split("\n", 1)
        if kind != "complete":
            raise RuntimeError(last)
        return json.loads(data.split("data: ", 1)[1])[0]

    def memory(self) -> float:
        """MB that it has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def kill(self) -> None:
        """As by the system."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def settings_of(visitor: int, k: int) -> tuple[str, int]:
    """The prompt and the seed of a visitor's k-th request."""
    return f"a photo of the face of a {WHO[(visitor + k) % len(WHO)]}, a person", 1000 * visitor + k


def load(server: Server, visitors: int, requests: int) -> tuple[dict, list[str], dict[int, float]]:
    """(visitor, k) -> reply; what was lost; memory after so many replies."""
    replies, lost, memory, lock = {}, [], {}, threading.Lock()

    def visit(visitor):
        for k in range(requests):
            prompt, seed = settings_of(visitor, k)
            try:
                reply = server.draw(prompt, "", seed, N, 2.5, STEPS, "gender", 1.0)
            except Exception as error:  # whatever it is, the request is lost
                with lock:
                    lost.append(f"{visitor}, {k}: {error!r}"[:200])
                continue
            with lock:
                replies[visitor, k] = reply
                memory[len(replies)] = server.memory()

    threads = [threading.Thread(target=visit, args=(visitor,)) for visitor in range(visitors)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies, lost, memory


def mixed_up(replies: dict, every: int = 1) -> list[tuple[int, int]]:
    """The requests whose reply is not of their own settings and pictures; every so many of them are drawn anew."""
    bundle = load_bundle(ROOT / "weights" / "emoji")
    models = {
        "original": bundle,
        "fair": load_adapter(bundle, ROOT / "weights" / "emoji" / "adapters" / "gender.safetensors"),
    }
    wrong = []
    for place, ((visitor, k), reply) in enumerate(sorted(replies.items())):
        prompt, seed = settings_of(visitor, k)
        is_right = (reply["view"]["prompt"], reply["view"]["seed"]) == (prompt, seed)
        for label, model in models.items() if place % every == 0 else ():
            found = np.asarray(Image.open(io.BytesIO(base64.b64decode(reply[label]["images"][0]))))
            x = sample_tensor(model, SampleSettings(prompt, N, seed, STEPS, 2.5))
            # threads of the server may add in another order
            is_right &= bool(np.abs(found.astype(int) - np.asarray(to_image(x[0])).astype(int)).max() <= 1)
        if not is_right:
            wrong.append((visitor, k))
    return wrong


def leave(server: Server, count: int) -> None:
    """Visitors who ask for much and go before it is drawn."""
    for _ in range(count):
        event = json.loads(server.ask("POST", "/gradio_api/call/draw", {"data": LARGE})[1])["event_id"]
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        connection.request("GET", f"/gradio_api/call/draw/{event}")
        connection.getresponse()
        time.sleep(1)
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--visitors", type=int, default=20)
    parser.add_argument("--requests", type=int, default=10, help="of each visitor")
    parser.add_argument("--every", type=int, default=1, help="how many replies are drawn anew: every so many")
    parser.add_argument("--port", type=int, default=7900)
    options = parser.parse_args()
    server, failed = Server(options.port, 2 * options.visitors), False

    def say(is_good, sentence):
        nonlocal failed
        failed |= not is_good
        print("ok  " if is_good else "FAIL", sentence, flush=True)

    try:
        began = time.monotonic()
        replies, lost, memory = load(server, options.visitors, options.requests)
        count, asked = len(replies), options.visitors * options.requests
        say(
            count == asked,
            f"{asked - count} of {asked} requests lost {lost[:3] or ''} ({time.monotonic() - began:.0f} s)",
        )
        wrong = mixed_up(replies, options.every)
        say(not wrong, f"{len(wrong)} of {count} replies are another's {wrong[:3] or ''}")
        early = memory[min(20, count)]
        growth = memory[count] / early - 1
        say(
            abs(growth) <= 0.05,
            f"memory {early:.0f} MB after {min(20, count)} requests, {growth:+.1%} after {count}",
        )
        began = time.monotonic()
        server.draw(*LARGE)
        long = time.monotonic() - began
        leave(server, 3)
        began = time.monotonic()
        server.draw("a photo", "", 0, 1, 2.5, 1, "gender", 1.0)
        took = time.monotonic() - began
        say(took < long, f"behind three who left requests of {long:.0f} s the next one waited {took:.1f} s")
        server.kill()
        server = Server(options.port, 2 * options.visitors)
        prompt, seed = settings_of(0, 0)
        again = server.draw(prompt, "", seed, N, 2.5, STEPS, "gender", 1.0)
        say(again == replies[0, 0], "killed and started again it draws the same bytes")
    finally:
        server.kill()
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
