"""The mean over the samples of an update, of the loss, of what is reported beside it, and so of gradients.

With one micro-batch size that is the mean over micro-batches. Where buckets have micro-batch sizes of their own, a
micro-batch counts by its number of samples, whatever its process:

    sum of samples_m * mean_m  /  sum of samples_m          over the micro-batches m of all processes

The lower sum is known last, and only on the device, so that no process waits for it: gradients are computed of the
losses times samples_m / `largest`, and multiplied with what is missing once they are complete.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from warpcore.data.reader import Batch
from warpcore.processes import Processes


class UpdateMean:
    """Of one update.

    Args:
        accumulation: its micro-batches per process.
        largest: the largest micro-batch size where buckets have sizes of their own; None where all have one.
    """

    def __init__(self, processes: Processes, accumulation: int, largest: int | None):
        self.processes, self.accumulation, self.largest = processes, accumulation, largest
        self._own = 0.0
        self._num_read = 0
        """Micro-batches of this process of which a sample could be read."""
        self._samples: Tensor | None = None

    def weight_of(self, batch: Batch) -> float:
        """What the mean loss of the next micro-batch counts before it is divided by `accumulation`."""
        self._num_read += batch.weight > 0
        if self.largest is None:
            return batch.weight
        samples = batch.weight * len(batch.seeds)
        self._own += samples
        return samples / self.largest

    def correction(self) -> Tensor | None:
        """What to multiply gradients with, which are the means of all processes' (collective); None: nothing.

        To be called once, after the last micro-batch.
        """
        if self.largest is None:
            return None
        own = torch.full((), self._own if self.processes.counts_data else 0.0, device=self.processes.device)
        self._samples = self.processes.sum(own)
        return self._factor()

    def _factor(self) -> Tensor:
        return self.largest * self.accumulation * self.processes.data_count / self._samples.clamp(min=1)

    def of(self, weighted: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Of this process's weighted means (0-d, by name) its share of those over all samples: the mean of the
        processes' shares is that mean."""
        means = {name: torch.stack([one[name] for one in weighted]).mean() for name in weighted[0]}
        return means if self.largest is None else {name: mean * self._factor() for name, mean in means.items()}

    def decided(self, usable: Tensor, means: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Whether the update is made (collective, on the device), and the means `of` it: NaN if nothing was read.

        It is made where it is `usable` (0-d, bool) on every process, and some sample of it could be read on any.
        """
        votes = torch.stack([(~usable).int(), torch.full_like(usable, self._num_read, dtype=torch.int32)])
        unusable, num_read = self.processes.sum(votes).unbind()
        means = {name: torch.where(num_read > 0, mean, torch.nan) for name, mean in means.items()}
        return (unusable == 0) & (num_read > 0), means

    @property
    def metrics(self) -> dict[str, Tensor]:
        """`samples`: how many the update has, of all processes; where all have one micro-batch size, nothing."""
        return {} if self._samples is None else {"samples": self._samples}
