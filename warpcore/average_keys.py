"""The keys of the averages of weights, which every training script understands."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from warpcore.config_keys import Settings, ShareBelowOne
from warpcore.idle_keys import Need

SigmaRel = Annotated[float, Field(ge=0.01, le=0.28)]
"""The standard deviation over time of the shares of an average, relative to the length of the run."""


class PostHocEMA(Settings):
    """Averages of which others are made after the run."""

    every: PositiveInt
    sigma_rel: tuple[SigmaRel, SigmaRel] = (0.05, 0.1)

    @model_validator(mode="after")
    def _two(self) -> Self:
        if len({f"{one:g}" for one in self.sigma_rel}) == 1:  # what their folders are called
            raise ValueError(f"sigma_rel: {list(self.sigma_rel)} is one average twice: write two, such as [0.05, 0.1]")
        return self


class AverageKeys(Settings):
    """Average of the weights."""

    needs = dict.fromkeys(
        ("ema_iters", "ema_beta", "ema_at_end"),
        Need("ema_start_iters", lambda config: config.ema_start_iters is not None),
    ) | {
        "ema_device": Need(
            "ema_start_iters or post_hoc_ema",
            lambda config: config.ema_start_iters is not None or config.post_hoc_ema is not None,
        )
    }

    ema_start_iters: NonNegativeInt | None = None
    """First update of the exponential moving average; without this key there is none."""
    ema_iters: PositiveInt = 1
    """The average moves at every this many updates."""
    ema_beta: ShareBelowOne = 0.999
    """Share of the old average that a step keeps."""
    ema_at_end: bool = False
    """After the last update the average moves once more, whatever `ema_iters` says, as that of NOVA's program does."""
    ema_profile: Literal["constant", "power"] = "constant"
    """`power`: that share grows with the updates instead, so that the average always reaches back over the same part
    of the run, `ema_rate` (EDM2, arXiv:2312.02696, section 3.1)."""
    ema_rate: Annotated[float, Field(gt=0, le=0.28)] = 0.1
    """With `ema_profile: power`: the standard deviation of the average's weights over time, as a fraction of the run
    so far. 0.28 averages nearly evenly over all of it, 0.05 over about the last tenth."""
    ema_iteration_shift: NonNegativeInt = 0
    """With `ema_profile: power`: how many updates count as made before the first one, as when a run goes on from the
    weights of another."""
    ema_device: Literal["same", "cpu"] = "same"
    """Keep the average beside the weights, or in the CPU's memory."""
    post_hoc_ema: PostHocEMA | None = None
    """Keep two averages with the profiles `sigma_rel`, and export snapshots of both, which are never deleted, after
    each `every` updates and at the end: `{every: 5000}`. `tools/average.py` makes the average of any other length of
    them (EDM2, arXiv:2312.02696, section 3.2)."""
