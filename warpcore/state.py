"""What a checkpoint holds of networks, averages, optimizers and bookkeeping: tensors by name, the rest as JSON.

Names are `network/NAME/PARAMETER`, `ema/NAME/PARAMETER`, `bookkeeping/NAME/BUFFER`, `optimizer/NAME.PARAMETER.STATE`.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warpcore import optim
from warpcore.checkpoint import CheckpointError, Checkpoints
from warpcore.ema import EMA, named_tensors, reshard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedState:
    """What updates change: trained networks, their averages (some or none), their optimizers, and bookkeeping."""

    networks: Mapping[str, nn.Module]
    averages: Mapping[str, EMA]
    optimizers: list[Optimizer]
    bookkeeping: Mapping[str, Any]
    """Further things with a state_dict of tensors."""

    @contextmanager
    def in_use(self, average: bool = False) -> Iterator[None]:
        """The networks are in evaluation mode, with their averages as weights if asked for; then all is back."""
        optim.eval_mode(self.optimizers)
        for network in self.networks.values():
            network.eval()
            reshard(network)  # gathered copies would hide that the weights change
        try:
            with torch.no_grad(), ExitStack() as swaps:
                for name, one in self.averages.items() if average else ():
                    swaps.enter_context(one.applied_to(self.networks[name]))
                yield
        finally:
            optim.train_mode(self.optimizers)
            for network in self.networks.values():
                reshard(network)

    def save(self) -> tuple[dict[str, Tensor], dict]:
        """The tensors (not copied) and the JSON values."""
        tensors, values = optim.optimizer_state(self.optimizers)
        return self._tensors() | self._averages() | _prefixed("optimizer", tensors), {"optimizer": values}

    def load(self, checkpoints: Checkpoints, update: int, values: dict, about: Mapping[str, str]) -> None:
        """Restore what was saved after `update`, and tell what cannot be.

        Args:
            values: the JSON values of that checkpoint. about: what files of this run say of themselves.

        Raises:
            CheckpointError: the checkpoint is of another model.
        """
        stored = checkpoints.stored(update)
        said = values.get("about", {})
        wrong = [
            f"{key} was {said[key]} and is now {about[key]}" for key in said if about.get(key, said[key]) != said[key]
        ]
        tensors = self._tensors()
        averages = self._averages() if any(name.startswith("ema/") for name in stored) else {}
        wrong = wrong or self._differences(tensors | averages, stored)
        if wrong:
            raise CheckpointError(
                f"the checkpoint of update {update} in {checkpoints.name} is of another model: {wrong[0]}"
                + (f", and {len(wrong) - 1} more differences" if len(wrong) > 1 else "")
                + ". Restore the settings of that run, or choose another experiment_id"
            )
        if not self.averages and any(name.startswith("ema/") for name in stored):
            logger.warning("ema_start_iters is left out: the average of the weights ends with update %d", update)
        optim.check_same_optimizers(self.optimizers, values["optimizer"])
        optimizer = optim.allocate_optimizer_state(self.optimizers, _without("optimizer", stored))
        checkpoints.load(update, tensors | averages | _prefixed("optimizer", optimizer))
        optim.load_optimizer_state(self.optimizers, optimizer, values["optimizer"])
        for name, average in self.averages.items():
            own = _without(f"ema/{name}", averages)
            if own:
                average.load_state_dict(own, update)
            else:  # the average is new in this run's config: it starts from the restored weights
                average.restart(update)

    def without_gradients(self) -> dict[str, Tensor]:
        """What changes without gradients (not copied): buffers of trained networks, and bookkeeping."""
        trained = {
            f"network/{name}/{p}" for name, network in self.networks.items() for p, _ in network.named_parameters()
        }
        return {name: tensor for name, tensor in self._tensors().items() if name not in trained}

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {}
        for name, network in self.networks.items():
            tensors |= _prefixed(f"network/{name}", named_tensors(network))
        for name, module in self.bookkeeping.items():
            tensors |= _prefixed(f"bookkeeping/{name}", module.state_dict())
        return tensors

    def _averages(self) -> dict[str, Tensor]:
        tensors = {}
        for name, average in self.averages.items():
            tensors |= _prefixed(f"ema/{name}", average.state_dict())
        return tensors

    def _differences(self, here: dict[str, Tensor], stored: dict) -> list[str]:
        """How the tensors of a checkpoint differ from those here; an average that is no longer wanted does not."""
        kept = {name for name in stored if not name.startswith("optimizer/")}
        if not self.averages:
            kept = {name for name in kept if not name.startswith("ema/")}
        wrong = [f"{name} is only in the checkpoint" for name in sorted(kept - here.keys())]
        wrong += [f"{name} is not in the checkpoint" for name in sorted(here.keys() - kept)]
        wrong += [
            f"{name} is {tuple(stored[name][0])} in the checkpoint and {tuple(tensor.shape)} here"
            for name, tensor in here.items()
            if name in kept and stored[name][0] != tensor.shape
        ]
        return wrong


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _without(prefix: str, tensors: dict) -> dict:
    prefix = f"{prefix}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
