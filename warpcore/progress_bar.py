"""The progress bar of every script and tool: one line that moves in a terminal, whole lines now and then in a log."""

import sys
import time
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30
"""Between two lines in a log, as a job of Slurm has."""


class ProgressBar(tqdm):
    """tqdm's, but where standard error is no terminal, it writes a line every `LOG_SECONDS` and one at the end."""

    def __init__(self, *arguments: Any, **named: Any):
        self._in_terminal = sys.stderr.isatty()
        self._logged_at, self._logged = time.monotonic(), None
        super().__init__(*arguments, **named)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self._in_terminal:
            super().display(msg, pos)
        elif time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._log()

    def clear(self, nolock: bool = False) -> None:
        if self._in_terminal:
            super().clear(nolock)

    def close(self) -> None:
        if not self._in_terminal and not getattr(self, "disable", True):
            if self._logged != self.n and time.time() >= self.start_t + self.delay:
                self._log()
            self.sp = None  # tqdm writes nothing more then
        super().close()

    def _log(self) -> None:
        self._logged_at, self._logged = time.monotonic(), self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()
