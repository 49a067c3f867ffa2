"""How an update of `benchmarks/train_step.py` is made, one technique changed at a time."""

from dataclasses import dataclass, field, replace

import torch


@dataclass(frozen=True)
class Technique:
    """How our update is made: all that helps, or one thing less or more."""

    name: str = "ours"
    fused_feed_forward: bool = True
    fused_optimizer: bool = True
    compiled: bool = True
    whole: dict | None = None
    """Compile the whole network instead of its blocks, with these arguments of `torch.compile`. The mode
    "reduce-overhead" records CUDA graphs, which pays where launching kernels takes longer than they do."""
    fp8: bool = False
    bfloat16_weights: bool = False
    """On a GPU, where autocast brings activations to the same precision."""
    optimizer: str = "adamw"
    fused_backward: bool = False
    """Step in the backward pass, and clip nothing."""
    frozen_weights: str | None = None
    """How the base of a LoRA is kept, where it is not in bfloat16."""
    swapped: float = 0.0
    """This share of the blocks of a frozen base waits in the CPU's memory (`warpcore.block_swap`)."""
    checkpointing: int | None = None
    """Another level of activation checkpointing than the case's."""
    cases: tuple[str, ...] = field(default=("full", "LoRA", "ControlNet"))


def techniques(device: torch.device, levels: bool = False) -> list[Technique]:
    """Ours and its variations; with `levels`, those of activation checkpointing."""
    ours = Technique(compiled=device.type == "cuda")
    if levels:
        return [replace(ours, name=f"ours, level {level}", checkpointing=level) for level in (0, 1, 2, 3)]
    plain = replace(ours, compiled=False)
    trained = ("full",)
    rest = [
        replace(ours, name="- fused AdamW", fused_optimizer=False, cases=trained),
        replace(plain, name="- fused feed-forward, not compiled", fused_feed_forward=False),
    ]
    came = replace(plain, bfloat16_weights=device.type == "cuda", optimizer="came", cases=trained)
    rest += [
        replace(ours, name="+ fused backward", fused_backward=True, cases=trained),
        replace(came, name="CAME, not compiled"),
        replace(came, name="CAME, not compiled, fused backward", fused_backward=True),
    ]
    swapping = [
        replace(ours, name=f"{share:.0%} of the blocks swapped, level 3", checkpointing=3, swapped=share,
                cases=("LoRA", "ControlNet"))
        for share in (0.5, 1.0)
    ]  # fmt: skip
    packed = [
        replace(ours, name=f"base in {dtype}", frozen_weights=dtype, cases=("LoRA",))
        for dtype in ("float8_e4m3fn", "float8", "int8", "int8_rotated")
    ]
    if device.type == "cuda":
        return [
            ours, replace(plain, name="- compile"), *rest,
            replace(ours, name="whole network compiled", whole={}),
            replace(ours, name="+ CUDA graphs", whole={"mode": "reduce-overhead"}),
            replace(ours, name="+ fp8", fp8=True, cases=trained),
            replace(ours, name="+ bfloat16 weights", bfloat16_weights=True, cases=trained), *packed, *swapping,
        ]  # fmt: skip
    return [ours, replace(ours, name="+ compile", compiled=True), *rest, *packed, *swapping]
