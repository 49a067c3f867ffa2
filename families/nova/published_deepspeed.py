"""A JSON of DeepSpeed as keys of ours: FSDP in place of ZeRO."""

from collections.abc import Mapping
from typing import Any

from families.common.converted import flat
from warpcore.text import brief

PREFIX = "DeepSpeed's "
STAGES = (0, 1, 2, 3)
CPU = "cpu"
SIZES = {
    "train_batch_size": "batch_size", "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "grad_accum_steps",
}  # fmt: skip
"""Keys that repeat what the training says, and ours for them."""
OFFLOADED = ("zero_optimization.offload_optimizer.device", "zero_optimization.offload_param.device")
REASONS = {
    **dict.fromkeys(OFFLOADED, "fsdp_cpu_offload moves to the CPU alone, and only what FSDP parts"),
    "zero_optimization.offload_optimizer.": "fsdp_cpu_offload has no such setting",
    "zero_optimization.offload_param.": "fsdp_cpu_offload has no such setting",
    "zero_optimization.": "FSDP gathers and shards block by block, without such settings",
    "optimizer": "the other program gives DeepSpeed an optimizer of its own",
    "scheduler": "the other program sets the learning rate itself",
    "bf16.": "dtype says what is computed in; weights and their average are kept in 32 bits here",
    "fp16.": "float16 scales the loss here without settings",
    "": "nothing here has such a setting",
}
"""Why keys that begin so are not taken over; the first that fits counts."""


def convert(
    given: Mapping[str, Any], processes: int, sizes: Mapping[str, int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Our keys for those of DeepSpeed, and why others are not taken over.

    Args:
        processes: of the training; there DeepSpeed is left out for a single one.
        sizes: what the training says of `SIZES`.

    Raises:
        ValueError: a key has a value that it can't have, or contradicts the training.
    """
    named = flat(given)
    if processes == 1:
        return {}, {f"{PREFIX}{name}": "with NUM_GPUS: 1 it is not used there, either" for name in named}
    values: dict[str, Any] = {}
    left = dict(named)
    if (stage := left.pop("zero_optimization.stage", 0)) not in STAGES or isinstance(stage, bool):
        raise ValueError(
            f"{PREFIX}zero_optimization.stage: found {brief(stage)}; there is {', '.join(map(str, STAGES))}"
        )
    values["use_fsdp"] = stage > 0
    if stage and CPU in map(left.get, OFFLOADED):
        values["fsdp_cpu_offload"] = True
    for name in OFFLOADED:
        if left.get(name) == "none" or (stage and left.get(name) == CPU):
            del left[name]
    clip = left.pop("gradient_clipping", None)
    if clip not in (None, 0, "auto"):
        values["clip_grad_norm"] = clip
    if left.pop("fp16.enabled", False) is True:
        values["dtype"] = "float16"
    for name in SIZES:
        size = left.pop(name, "auto")
        if size not in ("auto", sizes[name]):
            raise ValueError(f"{PREFIX}{name}: found {brief(size)}, but the training says {sizes[name]}: remove one")
    if left.get("bf16.enabled") is not True:
        left.pop("bf16.enabled", None)
    why = {name: next(reason for begin, reason in REASONS.items() if name.startswith(begin)) for name in left}
    if stage in (1, 2):
        why["zero_optimization.stage"] = (
            f"stage {stage} becomes use_fsdp, which shards the weights, too, as stage 3 does"
        )
    return values, {f"{PREFIX}{name}": reason for name, reason in why.items()}
