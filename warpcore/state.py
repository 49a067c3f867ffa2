"""What a checkpoint holds of networks, averages, optimizers and bookkeeping: tensors by name, the rest as JSON.

Names are `network/NAME/PARAMETER`, `ema/NAME/PARAMETER`, `bookkeeping/NAME/BUFFER`, `optimizer/NAME.PARAMETER.STATE`.
"""

import logging
from typing import TYPE_CHECKING

from torch import Tensor

from warpcore import optim
from warpcore.checkpoint import CheckpointError
from warpcore.ema import named_tensors

if TYPE_CHECKING:
    from warpcore.core import WarpCore

logger = logging.getLogger(__name__)


class RunState:
    """Saves and restores the trained state of `run`."""

    def __init__(self, run: "WarpCore"):
        self.run = run

    def save(self) -> tuple[dict[str, Tensor], dict]:
        """The tensors (not copied) and the JSON values."""
        tensors, values = optim.optimizer_state(self.run.optimizers)
        return self._networks() | self._averages() | _prefixed("optimizer", tensors), {"optimizer": values}

    def load(self, update: int, values: dict) -> None:
        """Restore what was saved after `update`.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        run = self.run
        stored = run.checkpoints.stored(update)
        said, says = values.get("about", {}), run.file_metadata()
        changed = [
            f"{key} was {said[key]} and is now {says[key]}" for key in said if says.get(key, said[key]) != said[key]
        ]
        if changed:
            raise self._another_model(update, changed)
        tensors = self._networks()
        averages = self._averages() if any(name.startswith("ema/") for name in stored) else {}
        self._check(update, tensors | averages, stored)
        optimizer = optim.allocate_optimizer_state(run.optimizers, _without("optimizer", stored))
        run.checkpoints.load(update, tensors | averages | _prefixed("optimizer", optimizer))
        optim.load_optimizer_state(run.optimizers, optimizer, values["optimizer"])
        for name, average in run.averages.items():
            own = _without(f"ema/{name}", averages)
            if own:
                average.load_state_dict(own, update)
            else:  # the average is new in this run's config: it starts from the restored weights
                average.restart(update)

    def without_gradients(self) -> dict[str, Tensor]:
        """What changes without gradients (not copied): buffers of trained networks, and bookkeeping."""
        networks = {name: self.run.networks[name] for name in self.run.trainable}
        trained = {f"network/{name}/{p}" for name, network in networks.items() for p, _ in network.named_parameters()}
        return {name: tensor for name, tensor in self._networks().items() if name not in trained}

    def _networks(self) -> dict[str, Tensor]:
        run = self.run
        tensors = {}
        for name in run.trainable:
            tensors |= _prefixed(f"network/{name}", named_tensors(run.networks[name]))
        for name, module in run.bookkeeping.items():
            tensors |= _prefixed(f"bookkeeping/{name}", module.state_dict())
        return tensors

    def _averages(self) -> dict[str, Tensor]:
        tensors = {}
        for name, average in self.run.averages.items():
            tensors |= _prefixed(f"ema/{name}", average.state_dict())
        return tensors

    def _check(self, update: int, here: dict[str, Tensor], stored: dict) -> None:
        kept = {name for name in stored if not name.startswith("optimizer/")}
        if not self.run.averages and any(name.startswith("ema/") for name in kept):
            logger.warning("ema_start_iters is left out: the average of the weights ends with update %d", update)
            kept = {name for name in kept if not name.startswith("ema/")}
        wrong = [f"{name} is only in the checkpoint" for name in sorted(kept - here.keys())]
        wrong += [f"{name} is not in the checkpoint" for name in sorted(here.keys() - kept)]
        wrong += [
            f"{name} is {tuple(stored[name][0])} in the checkpoint and {tuple(tensor.shape)} here"
            for name, tensor in here.items()
            if name in kept and stored[name][0] != tensor.shape
        ]
        if wrong:
            raise self._another_model(update, wrong)

    def _another_model(self, update: int, wrong: list[str]) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint of update {update} in {self.run.config.run_place} is of another model: {wrong[0]}"
            + (f", and {len(wrong) - 1} more differences" if len(wrong) > 1 else "")
            + ". Restore the settings of that run, or choose another experiment_id"
        )


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: dict) -> dict:
    prefix = f"{prefix}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
