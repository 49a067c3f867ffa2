"""What scripts have in common that leave the network of `generator_checkpoint_path` as it is, and train beside it."""

from collections.abc import Mapping
from typing import Self

from pydantic import NonNegativeInt, model_validator

from warpcore.config import Settings


class FrozenBaseKeys(Settings):
    """How a network is kept that isn't trained, but that gradients pass through."""

    swap_blocks: NonNegativeInt = 0
    """That many blocks of the frozen network, spread evenly over it, wait in the CPU's memory, and are copied to the
    device ahead of their turn, so that two of them are there at a time; with `activation_checkpointing: 3`, in one
    process. `tools/memory.py --gpu-memory` says how many are enough. Not yet tried on a GPU."""

    @model_validator(mode="after")
    def _blocks_that_can_wait(self) -> Self:
        if not self.swap_blocks:
            return self
        if self.activation_checkpointing != 3:
            raise ValueError(
                "swap_blocks needs blocks that compute again in the backward pass, which would keep copies of all of "
                "them otherwise: write activation_checkpointing: 3"
            )
        if self.compile == "graphs":
            raise ValueError(
                "swap_blocks: compile: graphs needs memory that stays where it is, but blocks come to other places "
                "each time; write compile: blocks, or remove swap_blocks"
            )
        if self.fsdp_cpu_offload:
            raise ValueError("swap_blocks and fsdp_cpu_offload move the same weights: remove one")
        return self


class FrozenBase:
    """Hooks of such a script; named before the class that trains the whole network."""

    frozen_base = True

    def swapped_blocks(self) -> Mapping[str, int]:
        return {"generator": self.config.swap_blocks}
