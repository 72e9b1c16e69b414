"""SIGTERM and Ctrl-C: the first asks a run to stop after its iteration, the second ends it at once."""

import signal
import sys
import threading

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """`with StopRequest() as stop: ...`; stop.asked says whether a signal came. Threads don't get signals."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        main = threading.current_thread() is threading.main_thread()
        self.before = {number: signal.signal(number, self._ask) for number in CAUGHT} if main else {}
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print(f"\n{signal.Signals(number).name}: stopping after this iteration", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
