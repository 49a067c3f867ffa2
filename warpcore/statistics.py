"""State that is not a gradient changes once per update, from all its micro-batches in their global order."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from warpcore.processes import Processes


class UpdateStatistics:
    """What the micro-batches of an update tell of state that is not a gradient, until `apply` changes that state."""

    def __init__(self, processes: Processes, networks: Mapping[str, nn.Module]):
        self.processes = processes
        self._norms = {name: BatchNormStatistics(network) for name, network in networks.items()}
        self._clear()

    def _clear(self) -> None:
        self._of_batch_norms: dict[str, list[dict[str, Tensor]]] = {name: [] for name in self._norms}
        self._of_losses: list[dict[str, Tensor]] = []

    def add(self, statistics: Mapping[str, Tensor], weight: float) -> None:
        """Take those of a micro-batch, which was just computed: (B, ...) by name, and its batch norms'."""
        counted = slice(None) if weight else slice(0)  # of a micro-batch without a readable picture nothing counts
        self._of_losses.append({name: value.detach()[counted] for name, value in statistics.items()})
        for name, norms in self._norms.items():
            self._of_batch_norms[name].append(norms.take(weight))

    def apply(
        self, update_state: Callable[[dict[str, Tensor]], None], state: Callable[[], dict[str, Tensor]], finite: Tensor
    ) -> None:
        """Change the state once, from the whole update; where `finite` is false it stays as it was.

        Args:
            update_state: gets the statistics of all samples in global order, where there are any.
            state: gives all tensors that change here, not copied.
        """
        before = {name: tensor.clone() for name, tensor in state().items()}
        for name, norms in self._norms.items():
            norms.apply(in_global_order(self.processes, self._of_batch_norms[name]))
        statistics = in_global_order(self.processes, self._of_losses)
        if statistics[0]:
            update_state({name: torch.cat([s[name] for s in statistics]) for name in statistics[0]})
        for name, tensor in state().items():
            tensor.copy_(torch.where(finite.to(tensor.device), tensor, before[name]))
        self._clear()


class BatchNormStatistics:
    """Running means and variances of a network's batch norms, moved once per update.

    Left alone, a batch norm moves its running statistics at every forward pass: their value would depend on the number
    of accumulation steps and on the process. Here a forward pass only records the mean and variance of its micro-batch
    (over B, H and W), and `apply` combines those of the whole update as one big batch.
    """

    def __init__(self, network: nn.Module):
        self.norms = {name: m for name, m in network.named_modules() if isinstance(m, _BatchNorm)}
        self._momentum = {name: norm.momentum for name, norm in self.norms.items()}
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._recorded: dict[str, list[Tensor]] = {}
        for name, norm in self.norms.items():
            norm.momentum = 1.0  # a forward pass leaves the statistics of its batch in the buffers, which are copies
            norm.register_forward_pre_hook(lambda norm, args, name=name: self._keep(name, norm))
            norm.register_forward_hook(lambda norm, args, _, name=name: self._record(name, norm, args[0]))

    def take(self, weight: float = 1.0) -> dict[str, Tensor]:
        """Statistics of the forward passes since the last call: (3, C) mean, variance and weighted count, by name."""
        recorded, self._recorded = self._recorded, {}
        pooled = {name: torch.stack(_pool(torch.stack(passes))) for name, passes in recorded.items()}
        for statistics in pooled.values():
            statistics[2] *= weight
        return pooled

    @torch.no_grad()
    def apply(self, per_micro_batch: list[dict[str, Tensor]]) -> None:
        """Move the running statistics by those of one update."""
        for name in per_micro_batch[0]:  # norms in evaluation mode recorded nothing
            norm = self.norms[name]
            mean_C, var_C, _ = _pool(torch.stack([recorded[name] for recorded in per_micro_batch]))
            for running, new in ((norm.running_mean, mean_C), (norm.running_var, var_C)):
                # A forward pass that is not finite must not spoil the network for good.
                usable = torch.where(new.isfinite(), new.to(running), running)
                running.lerp_(usable, self._momentum[name])
            norm.num_batches_tracked += 1

    def _keep(self, name: str, norm: _BatchNorm) -> None:
        if norm.training:
            self._kept[name] = dict(norm.named_buffers())
            for buffer_name, buffer in self._kept[name].items():
                setattr(norm, buffer_name, buffer.clone())

    @torch.no_grad()
    def _record(self, name: str, norm: _BatchNorm, x: Tensor) -> None:
        if not norm.training:
            return
        count = torch.full_like(norm.running_mean, x.numel() / x.shape[1])
        statistics = torch.stack([norm.running_mean, norm.running_var, count]).float()
        self._recorded.setdefault(name, []).append(statistics)
        for buffer_name, buffer in self._kept.pop(name).items():
            setattr(norm, buffer_name, buffer)


def _pool(statistics_M3C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, unbiased variance and count of all samples, from those of M batches (law of total variance)."""
    means, variances, counts = statistics_M3C.unbind(1)
    if len(counts) == 1:  # bit for bit
        nothing = torch.where(counts[0] > 0, 0.0, torch.nan)
        return means[0] + nothing, variances[0] + nothing, counts[0]
    count = counts.sum(0)
    mean = (means * counts).sum(0) / count  # not a number where nothing was counted
    squares = variances * (counts - 1).clamp(min=0) + (means - mean) ** 2 * counts
    return mean, squares.sum(0) / (count - 1).clamp(min=1), count


def has_batch_norms(network: nn.Module) -> bool:
    """Whether running statistics of batch norms are part of a network."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def in_global_order(processes: Processes, own: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The statistics of all micro-batches of an update: those of this process, interleaved with the others'.

    Micro-batch i of process r has the global number i * processes + r within the update.
    """
    if processes.count == 1 or not own[0]:
        return own
    everyone = processes.gather_of_data([{name: value.cpu() for name, value in stats.items()} for stats in own])
    ordered = [everyone[rank][i] for i in range(len(own)) for rank in range(processes.data_count)]
    return [{name: value.to(processes.device) for name, value in stats.items()} for stats in ordered]
