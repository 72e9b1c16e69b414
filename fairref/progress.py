"""A progress bar on stderr."""

import shutil
import sys
import time

WIDTH = 24  # characters of the bar
QUIET = 30  # seconds between lines where stderr is a file


class Progress:
    """`with Progress(total, "label") as bar: ... bar.step("note")`, one step a piece of work."""

    def __init__(self, total: int, label: str, shown: bool = True, done: int = 0):
        self.total, self.label, self.shown, self.done = total, label, shown, done
        self.first, self.start, self.last = done, time.monotonic(), -float("inf")

    def __enter__(self):
        return self

    def step(self, note: str = "", steps: int = 1) -> None:
        """Counts `steps` as done and shows `note` behind the bar."""
        self.done += steps
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not self.shown or not (terminal or now - self.last >= QUIET or self.done >= self.total):
            return
        self.last = now
        left = (now - self.start) * (self.total - self.done) / max(self.done - self.first, 1)
        full = round(WIDTH * self.done / max(self.total, 1))
        count = f"{self.done}/{self.total}, {_clock(left)} left"
        line = f"{self.label} [{'#' * full}{'.' * (WIDTH - full)}] {count}  {note}"
        if terminal:
            line = "\r\033[K" + line[: shutil.get_terminal_size().columns - 1]  # a wrapped line would stay
        print(line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        if self.shown and sys.stderr.isatty() and self.done > self.first:
            print(file=sys.stderr)


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
