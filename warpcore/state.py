"""What a checkpoint holds of networks, averages, optimizers and bookkeeping: tensors by name, the rest as JSON.

Names are `network/NAME/PARAMETER`, `ema/NAME/PARAMETER`, `post_hoc/SIGMA_REL/NAME/PARAMETER`,
`bookkeeping/NAME/BUFFER`, `optimizer/NAME.PARAMETER.STATE`.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from warpcore import optim
from warpcore.checkpoint import CheckpointError, Checkpoints
from warpcore.ema import EMA, named_tensors, reshard

POST_HOC = "post_hoc_ema"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainedState:
    """What updates change: trained networks, their averages (some or none), their optimizers, and bookkeeping."""

    networks: Mapping[str, nn.Module]
    averages: Mapping[str, EMA]
    optimizers: list[Optimizer]
    bookkeeping: Mapping[str, Any]
    """Further things with a state_dict of tensors."""
    post_hoc: Mapping[str, Mapping[str, EMA]] = field(default_factory=dict)
    """Averages of which others are made (`warpcore.post_hoc_ema`), by `sigma_rel` and network."""

    @contextmanager
    def in_use(self, averages: Mapping[str, EMA] = MappingProxyType({})) -> Iterator[None]:
        """The networks are in evaluation mode, with averages as their weights if some are given; then all is back."""
        optim.eval_mode(self.optimizers)
        for network in self.networks.values():
            network.eval()
            reshard(network)  # gathered copies would hide that the weights change
        try:
            with torch.no_grad(), ExitStack() as swaps:
                for name, one in averages.items():
                    swaps.enter_context(one.applied_to(self.networks[name]))
                yield
        finally:
            optim.train_mode(self.optimizers)
            for network in self.networks.values():
                reshard(network)

    @property
    def post_hoc_averages(self) -> list[EMA]:
        return [average for averages in self.post_hoc.values() for average in averages.values()]

    def step_averages(self, update: int, ok: Tensor, once_more: bool) -> None:
        """Take in the weights after `update`, as `EMA.step`. once_more: the averages to export."""
        for average in self.averages.values():
            average.step(update, ok, once_more)
        for average in self.post_hoc_averages:
            average.step(update, ok)

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
        there = [prefix for prefix in self._kinds() if any(name.startswith(f"{prefix}/") for name in stored)]
        averages = self._averages(there)
        wrong = wrong or self._differences(tensors | averages, stored)
        if wrong:
            raise CheckpointError(
                f"the checkpoint of update {update} in {checkpoints.name} is of another model: {wrong[0]}"
                + (f", and {len(wrong) - 1} more differences" if len(wrong) > 1 else "")
                + ". Restore the settings of that run, or choose another experiment_id"
            )
        for key, prefix, wanted in (("ema_start_iters", "ema", self.averages), (POST_HOC, "post_hoc", self.post_hoc)):
            if not wanted and any(name.startswith(f"{prefix}/") for name in stored):
                logger.warning("%s is left out: the average of the weights ends with update %d", key, update)
        optim.check_same_optimizers(self.optimizers, values["optimizer"])
        optimizer = optim.allocate_optimizer_state(self.optimizers, _without("optimizer", stored))
        checkpoints.load(update, tensors | averages | _prefixed("optimizer", optimizer))
        optim.load_optimizer_state(self.optimizers, optimizer, values["optimizer"])
        for prefix, kind in self._kinds().items():
            for name, average in kind.items():
                if prefix in there:
                    average.load_state_dict(_without(f"{prefix}/{name}", averages), update)
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

    def _kinds(self) -> dict[str, Mapping[str, EMA]]:
        """All averages, by the beginning of their names, and network."""
        return {"ema": self.averages} | {f"post_hoc/{sigma_rel}": one for sigma_rel, one in self.post_hoc.items()}

    def _averages(self, kinds: Iterable[str] | None = None) -> dict[str, Tensor]:
        tensors = {}
        for prefix in self._kinds() if kinds is None else kinds:
            for name, average in self._kinds()[prefix].items():
                tensors |= _prefixed(f"{prefix}/{name}", average.state_dict())
        return tensors

    def _differences(self, here: dict[str, Tensor], stored: dict) -> list[str]:
        """How the tensors of a checkpoint differ from those here; an average that is no longer wanted does not."""
        wanted = tuple(f"{prefix}/" for prefix, averages in self._kinds().items() if averages)
        others = ("optimizer/", "ema/", "post_hoc/")
        kept = {name for name in stored if name.startswith(wanted) or not name.startswith(others)}
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
