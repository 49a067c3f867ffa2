"""Networks of diffusers as the engine wants them: with blocks, activation checkpointing and compile per block.

`adapt` changes the class of a network and of its blocks, not their contents: parameters keep their official names, the
config stays, and the network remains an instance of the library's class.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Self

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from modules.blocks import compile_blocks, set_activation_checkpointing

PLUMBING = {"return_dict", "added_cond_kwargs", "cross_attention_kwargs", "attention_kwargs", "joint_attention_kwargs"}
"""Arguments of the library's `forward` methods that are no conditions."""
ADDED = {
    "text_time": ("text_embeds", "time_ids"), "text_image": ("text_embeds", "image_embeds"),
    "image": ("image_embeds",), "image_hint": ("image_embeds", "hint"),
}  # fmt: skip
"""Conditions that a U-Net takes in `added_cond_kwargs`, by its `addition_embed_type`."""
NUMBERS = {"time_ids", "resolution", "aspect_ratio"}
"""Conditions that go through sinusoids and keep their precision, as times do."""


class LibraryBlock:
    """What a block has beside the library's class: activation checkpointing, and `compute` to compile.

    `wide` blocks hold most of the activations: those with attention.
    """

    checkpointed = False

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self.checkpointed and is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False, **named)
        return self.compute(*inputs, **named)

    def compute(self, *inputs: Any, **named: Any) -> Any:
        return super().forward(*inputs, **named)

    @property
    def wide(self) -> bool:
        return any("Attention" in type(layer).__name__ for layer in self.modules())


class LibraryNetwork:
    """What a network has beside the library's class: the engine's protocol.

    Levels of activation checkpointing: 0 keeps all activations; 1 computes every second of the blocks with attention
    again in the backward pass, 2 all of those, 3 every block. Of a U-Net, blocks with attention are the transformer
    blocks, which hold most of the activations (feed-forward layers four times as wide as the level), and level 3 adds
    the residual blocks; layers between blocks (the samplers, the projections around transformers) are kept always.
    Where no block has attention, 1 and 2 keep all.
    """

    forward_methods = ()
    token_arguments: Mapping[str, int] | None = None
    """See `warpcore.networks.HasTokens`; for networks that are adapted as such."""

    @property
    def token_width(self) -> int:
        """C of its tokens, where it is a transformer."""
        return self.config.num_attention_heads * self.config.attention_head_dim

    @property
    def blocks(self) -> list[nn.Module]:
        """Its residual and transformer blocks: what compile, `fully_shard` and checkpointing are applied to."""
        return [module for module in self.modules() if isinstance(module, LibraryBlock)]

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that `forward` takes."""
        library = type(self).library
        names = list(inspect.signature(library.forward).parameters)[3:]  # self, latents, times
        config = getattr(self, "config", {})
        ignored = {
            "class_labels": config.get("class_embed_type") is None and config.get("num_class_embeds") is None,
            "timestep_cond": "time_cond_proj_dim" in config and config["time_cond_proj_dim"] is None,
        }
        taken = [name for name in names if name not in PLUMBING and not ignored.get(name)]
        return (*taken, *ADDED.get(config.get("addition_embed_type"), ()))

    def forward(
        self, x: Tensor, times: Tensor, *others: Any, return_dict: bool | None = None, **conditions: Any
    ) -> Tensor:
        """The prediction (B, C_out, H, W) of noised latents (B, C_in, H, W) at times (B,), integers or floats.

        Args:
            conditions: by the library's names, those of `added_cond_kwargs` too. Text: `encoder_hidden_states`
                (B, L, D); of SDXL also `text_embeds` (B, P) and `time_ids` (B, 6).
            return_dict: when it is given, this is the library's own `forward`, as its pipelines call it.
            others: only of such a call.

        Raises:
            ValueError: a condition that the network does not have.
        """
        if return_dict is not None:
            return super().forward(x, times, *others, return_dict=return_dict, **conditions)
        if others:
            raise TypeError(f"{type(self).__name__} takes conditions by name: {', '.join(self.conditions)}")
        if unknown := conditions.keys() - set(self.conditions):
            raise ValueError(
                f"{type(self).__name__} has no condition named {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(self.conditions)}"
            )
        dtype = next(p.dtype for name, p in self.named_parameters() if ".lora." not in name and p.dtype.itemsize > 1)
        given = {name: _in_dtype(name, value, dtype) for name, value in conditions.items()}
        if added := ADDED.get(getattr(self, "config", {}).get("addition_embed_type")):
            given["added_cond_kwargs"] = {name: given.pop(name) for name in added if name in given}
        return super().forward(x.to(dtype), times, return_dict=False, **given)[0]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of any module; the library's warns of every change of dtype."""
        return nn.Module.to(self, *args, **kwargs)

    def set_activation_checkpointing(self, level: int) -> None:
        """Choose which blocks compute their activations again in the backward pass: see the class."""
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        """Let `torch.compile` fuse what the blocks compute; with `graphs`, training replays it as CUDA graphs."""
        compile_blocks(self.blocks, graphs)


def adapt(
    network: nn.Module, blocks: Sequence[str] | None = None, token_arguments: Mapping[str, int] | None = None
) -> nn.Module:
    """Give a network of diffusers the engine's protocol, in place; returns it.

    Args:
        token_arguments: of a transformer whose blocks transform tokens one after another, see
            `warpcore.networks.HasTokens`; an empty mapping where nothing but the tokens is per token.
        blocks: names of the classes of its blocks. By default those that the library calls indivisible
            (`_no_split_modules`), without those that hold others of them: of `UNet2DConditionModel`
            `ResnetBlock2D` and `BasicTransformerBlock`.

    Raises:
        ValueError: the network has no such blocks.
    """
    kinds = set(blocks or getattr(network, "_no_split_modules", None) or ())
    found = [module for module in network.modules() if module is not network and type(module).__name__ in kinds]
    innermost = [module for module in found if not any(part in found for part in list(module.modules())[1:])]
    if not innermost:
        raise ValueError(f"{type(network).__name__} has no blocks of {sorted(kinds)}; name the classes of its blocks")
    for block in innermost:
        block.__class__ = _with(LibraryBlock, type(block))
    network.__class__ = _with(LibraryNetwork, type(network))
    network.token_arguments = token_arguments
    return network


@cache
def _with(part: type, library: type) -> type:
    """A subclass that goes by the library's name, which saved configs and messages state."""
    attributes = {"library": library, "__module__": library.__module__, "__doc__": library.__doc__}
    return type(library.__name__, (part, library), attributes)


def _in_dtype(name: str, value: Any, dtype: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point() and name not in NUMBERS
    return value.to(dtype) if floats else value
