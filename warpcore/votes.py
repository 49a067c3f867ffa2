"""What all processes decide together, without waiting for each other."""

import torch

from warpcore.processes import Processes


class Vote:
    """Whether any process wants something: cast once per update and counted one update later, so that a GPU's queue
    of work never runs dry for it."""

    def __init__(self, processes: Processes):
        self.processes = processes
        self._cast: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def cast(self, wanted: bool) -> bool:
        """Vote; returns the outcome of the vote before, which all processes share. Alone, that of this one."""
        if self.processes.count == 1:
            return wanted
        before = self._cast
        votes = self.processes.sum(torch.full((), float(wanted), device=self.processes.device))
        if votes.device.type == "cuda":
            self._cast = votes.to("cpu", non_blocking=True), torch.cuda.current_stream().record_event()
        else:
            self._cast = votes, None
        if before is None:
            return False
        votes, arrived = before
        if arrived is not None:
            arrived.synchronize()
        return bool(votes)
