"""What is said on stderr beside errors: a progress bar, and notes."""

import logging
import shutil
import sys
import time
from functools import cache

WIDTH = 24  # characters of the bar
QUIET = 30  # seconds between lines where stderr is a file


class Progress:
    """`with Progress(total, "label") as bar: ... bar.step("note")`, one step a piece of work."""

    def __init__(self, total: int, label: str, shown: bool = True, done: int = 0):
        self.total, self.label, self.shown, self.done = total, label, shown, done
        self.first, self.start, self.last = done, time.monotonic(), -float("inf")
        self.lines = 1  # that the terminal shows

    def __enter__(self):
        return self

    def step(self, note: str = "", steps: int = 1) -> None:
        """Counts `steps` as done and shows `note` behind the bar, or below it; two blanks part what stays together."""
        self.done += steps
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if not self.shown or not (terminal or now - self.last >= QUIET or self.done >= self.total):
            return
        self.last = now
        left = (now - self.start) * (self.total - self.done) / max(self.done - self.first, 1)
        count = f"{self.done}/{self.total}, {_clock(left)} left"
        columns = shutil.get_terminal_size().columns - 1 if terminal else 200
        width = max(0, min(WIDTH, columns - len(f"{self.label} [] {count}")))
        full = round(width * self.done / max(self.total, 1))
        line = f"{self.label} [{'#' * full}{'.' * (width - full)}] {count}  {note}"
        if not terminal:
            print(line, file=sys.stderr, flush=True)
            return
        back = f"\033[{self.lines - 1}A" if self.lines > 1 else ""
        lines = _folded(line, columns)
        self.lines = len(lines)
        print(f"\r{back}\033[J" + "\n".join(lines), end="", file=sys.stderr, flush=True)

    def __exit__(self, *error):
        if self.shown and sys.stderr.isatty() and self.done > self.first:
            print(file=sys.stderr)


@cache
def note(sentence: str) -> None:
    """Say a sentence once: what was left out or replaced, and is no mistake. The logger is named "fairref"."""
    logging.getLogger("fairref").warning(sentence)


def _folded(line, width):
    """The line in as many as it needs, broken at double blanks only; what is longer is cut, for the terminal would
    break it and not take it back."""
    lines = [""]
    for part in line.split("  "):
        longer = f"{lines[-1]}  {part}" if lines[-1] else part
        lines = [*lines[:-1], longer] if len(longer) <= width else [*lines, part]
    return [text[:width] for text in lines if text]


def _clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
