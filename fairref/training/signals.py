"""SIGTERM and Ctrl-C: in finetuning the first asks a run to stop after its iteration, the second ends it at once."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

CAUGHT = (signal.SIGINT, signal.SIGTERM)
ONE = 2.0  # seconds within which signals are one: a terminal sends it, and so does torchrun


class StopRequest:
    """`with StopRequest() as stop: ...`; stop.asked says whether a signal came. Threads don't get signals."""

    def __init__(self):
        self.asked, self.when = False, 0.0

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._ask) for number in CAUGHT} if main else {}
        return self

    def _ask(self, number, frame):
        if self.asked and time.monotonic() - self.when > ONE:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self.when = True, time.monotonic()
        print(f"\n{signal.Signals(number).name}: stopping after this iteration", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt here, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
