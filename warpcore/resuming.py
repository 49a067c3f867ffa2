"""What a start of a run goes on from: its own newest checkpoint, or at its first start that of another run."""

from typing import NamedTuple

import torch

from warpcore.checkpoint import Checkpoints
from warpcore.checkpoint_values import check_values
from warpcore.config import Config
from warpcore.errors import UserError
from warpcore.processes import Processes


class Origin(NamedTuple):
    """A checkpoint to go on from."""

    checkpoints: Checkpoints
    """Where it is: those of the run, or of another one."""
    update: int
    values: dict
    """What it holds as JSON."""
    is_own: bool
    """Whether it is the run's."""

    def told(self, updates: int) -> str:
        """A line about it. Raises UserError where another run leaves no update of `updates`."""
        name, update = self.checkpoints.name, self.update
        if update < updates:
            return f"{name} is at update {update}" + ("" if self.is_own else ", from which this run goes on")
        if not self.is_own:
            raise UserError(
                f"load: {name} is at update {update}, from which this run goes on, and updates is {updates}; write a "
                "larger number"
            )
        return (
            f"{name} is at update {update}: updates: {updates} leaves nothing to do; write a larger number to train on"
        )


def checkpoints_of(config: Config, processes: Processes) -> Checkpoints:
    """The checkpoints of a run."""
    export_dtype = getattr(torch, config.export_dtype) if config.export_dtype else None
    return Checkpoints(
        config.run_folder, processes, config.keep_last, config.run_url, export_dtype, config.export_file_gb * 1e9
    )


def origin_of(config: Config, own: Checkpoints, processes: Processes) -> Origin | None:
    """What a start goes on from (collective); None for a run from the beginning.

    Raises:
        CheckpointError: no checkpoint of it, or of the run that `load` names, is whole.
    """
    update = own.newest(check_values)
    if update is not None or config.load is None:
        return None if update is None else Origin(own, update, own.values(update), is_own=True)
    other = Checkpoints(config.load, processes, read_only=True)  # holds nothing that would have to be closed
    update = other.newest(check_values)
    return Origin(other, update, other.values(update), is_own=False)
