"""Running losses per bucket of noise levels, the state behind adaptive weights and schedules."""

import torch
from torch import Tensor


def mix_into_buckets(running: Tensor, bucket: Tensor, loss: Tensor, beta: float) -> None:
    """Mix losses into running means in place: for each sample in turn, running = running * beta + loss * (1 - beta).

    Every sample of a bucket counts, the later ones more, as if they had come in updates of one sample each. A loss
    that is not finite is left out: it would stay in the running mean for ever.

    Args:
        running: (K,) running loss of each bucket.
        bucket: (N,) int64, bucket of each sample.
        loss: (N,) loss of each sample, on the device of `running`.
    """
    numbers = torch.arange(len(running), device=running.device)
    member = (bucket == numbers[:, None]) & loss.isfinite()  # (K, N)
    later = member.flip(1).cumsum(1).flip(1) - 1  # samples of the same bucket that follow
    share = torch.where(member, (1 - beta) * beta**later, 0.0)
    # Sums over rows instead of index_add_, whose order on a GPU is not fixed.
    running.mul_(beta ** member.sum(1)).add_((share * loss.float().nan_to_num(0.0, 0.0, 0.0)).sum(1))
