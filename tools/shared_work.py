"""Work that a tool shares over the processes of torchrun or srun, such as building or indexing a data set.

Every process runs the whole tool; `SharedWork.do` runs a part of it on all of them, each with its own share, and gives
each the results of all. Where one process fails, all end with its message.
"""

import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from warpcore.errors import UserError
from warpcore.peers import explained
from warpcore.processes import Processes
from warpcore.text import read_text

WAIT_TIMEOUT = timedelta(days=30)
"""A process that has done its share waits this long for others at work."""
MARK_NAME = ".failed"
Made = TypeVar("Made")
ALONE = Processes(0, 1, torch.device("cpu"))


class SharedWork:
    """The processes of a tool.

    Args:
        mark_folder: a folder that all of them see; a process that fails leaves its message there, where the others
            look while they work. Without it they learn of it when they have done their own share.
    """

    def __init__(self, processes: Processes, mark_folder: Path | None = None):
        self.processes = processes
        self._mark = mark_folder and mark_folder / MARK_NAME
        self._group = processes.another_group(WAIT_TIMEOUT)

    def do(self, work: Callable[[], Made]) -> list[Made]:
        """What `work` gives on each process, in the order of ranks, on all of them (collective).

        Raises:
            UserError: on all processes, where it was raised on one, or that one had another exception.
            RuntimeError: a process was killed.
        """
        if self._group is None:
            return [work()]
        made = fault = own = None
        try:
            made = work()
        except Exception as error:
            own, fault = error, self._described(error)
            self._leave_mark(fault)
        results = [None] * self.processes.count
        with explained():
            dist.all_gather_object(results, (made, fault), group=self._group)
        if own is not None:
            raise own
        if faults := [fault for _, fault in results if fault is not None]:
            self.check()  # of several faults the first one counts, where that is known
            raise UserError(f"another process failed: {faults[0]}")
        return [made for made, _ in results]

    def on_main(self, work: Callable[[], Made]) -> Made:
        """What `work` gives on the main process, on all of them (collective)."""
        return self.do(lambda: work() if self.processes.is_main else None)[0]

    def own(self, items: list) -> list:
        """Every count-th of `items`, beginning at the rank: the share of this process."""
        return items[self.processes.rank :: self.processes.count]

    def check(self) -> None:
        """Raises UserError where another process has left its message; called now and then at work."""
        if self._mark is None or self.processes.count == 1:
            return
        with suppress(FileNotFoundError):
            told = read_text(self._mark) or "its own output says why"
            raise UserError(f"another process failed: {told}")

    def _described(self, error: Exception) -> str:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"process {self.processes.rank} on {socket.gethostname()}: {kind}{error}"

    def _leave_mark(self, message: str) -> None:
        if self._mark is not None:
            with suppress(OSError), self._mark.open("x", encoding="utf-8") as file:  # the first one counts
                file.write(message)
