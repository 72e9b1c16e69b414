"""SIGTERM, Ctrl-C and a terminal that hangs up.

In finetuning the first asks a run to stop after its iteration, the second ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
ONE = 2.0  # seconds within which signals are one: a terminal sends it, and so does torchrun


def caught() -> list[signal.Signals]:
    """The signals that stop a run. After `nohup` a terminal may hang up."""
    hangs_up = HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([HANG_UP] if hangs_up else [])]


class StopRequest:
    """`with StopRequest() as stop: ...`; stop.asked says whether a signal came. Threads don't get signals."""

    def __init__(self):
        self.asked, self.when = False, 0.0

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._ask) for number in caught()} if main else {}
        return self

    def _ask(self, number, frame):
        if self.asked and time.monotonic() - self.when > ONE:
            raise KeyboardInterrupt
        if self.asked:
            return
        self.asked, self.when = True, time.monotonic()
        with suppress(OSError):  # not print, in the middle of which the signal may have come
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this iteration\n".encode())

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextmanager
def interrupting() -> Iterator[None]:
    """Every signal that stops a run raises KeyboardInterrupt here, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in caught()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
