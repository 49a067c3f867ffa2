"""The progress bar of a run: loss, learning rate, gradient norm, speed, waiting for data, memory, times."""

import resource
import sys
from collections.abc import Sequence

import torch

from warpcore.notes import Notes
from warpcore.progress_bar import ProgressBar
from warpcore.redaction import redact


class Progress:
    """One line that moves in a terminal, and one line every half minute in a log file. Silent where not `shown`.

    notes: what it says is kept there, too.
    """

    def __init__(self, shown: bool, updates: int, update: int, device: torch.device, notes: Notes | None = None):
        self.device, self._notes = device, notes or Notes()
        self._bar = ProgressBar(
            total=updates,
            initial=update,
            disable=not shown,
            unit="update",
            dynamic_ncols=sys.stderr.isatty(),
            mininterval=0.5,
        )

    def show(self, line: dict) -> None:
        """Show a line of the metrics."""
        self._bar.set_postfix_str(
            f"loss {line['loss']:.4f}, lr {line['lr']:.1e}, grad {line['grad_norm']:.2f}, "
            f"{line['samples_per_second']:.1f} samples/s, data wait {line['data_wait']:.2f} s, "
            f"{self._memory_gib():.1f} GiB"
            + "".join(f", {name[3:]} {value:.1f} ms" for name, value in line.items() if name.startswith("ms/")),
            refresh=False,
        )
        self._bar.update(line["update"] - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if not self._bar.disable:
            ProgressBar.write(redact(text), file=sys.stderr)
            self._notes.add(self._bar.n, text)

    def end(self, update: int, next_commands: Sequence[str]) -> None:
        """The run ends after this update; if it was the last one, the commands that may come next are told."""
        for line in next_commands if update >= self._bar.total else ():
            self.say(line)
        self._notes.end(update, self._bar.total)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()

    def _memory_gib(self) -> float:
        """Peak memory: of the GPU, or of this process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB
