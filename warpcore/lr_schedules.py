"""The learning rate of each update."""

import math

from warpcore.errors import UserError

SCHEDULES = ("constant", "cosine", "linear")


def lr_at(
    update: int, *, schedule: str, lr: float, warmup_updates: int, updates: int, min_lr_ratio: float = 0.0
) -> float:
    """The learning rate of an update, counted from 1.

    Warm-up is linear: update 1 runs at lr / warmup_updates, update `warmup_updates` at lr. From there `cosine`
    (arXiv:1608.03983, equation 5, without restarts) and `linear` go to lr * min_lr_ratio, reached at update `updates`.
    """
    if schedule not in SCHEDULES:
        raise UserError(f"lr_schedule: {schedule!r} is unknown; write one of {', '.join(SCHEDULES)}")
    if update < warmup_updates:
        return lr * update / warmup_updates
    if schedule == "constant":
        return lr
    peak = max(warmup_updates, 1)
    progress = min((update - peak) / max(updates - peak, 1), 1.0)
    remaining = (1 + math.cos(math.pi * progress)) / 2 if schedule == "cosine" else 1 - progress
    return lr * (min_lr_ratio + (1 - min_lr_ratio) * remaining)
