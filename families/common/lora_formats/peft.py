"""peft's names of tensors and its config, for `PeftModel.from_pretrained` and the LoRA files of diffusers."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from families.common.lora_formats.adapters import Adapter, LoraFileError, is_alpha, lora_alone
from warpcore.patterns import searching
from warpcore.text import brief, shortened

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to start (`init_lora_weights`) that also change the frozen weights, so that adapters alone say too little."""


def to_peft(adapters: Mapping[str, Adapter], prefix: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors, behind a prefix, and the config, of adapters by the names of their layers.

    Raises LoraFileError for a depthwise convolution, whose adapter peft builds differently, DoRA by columns, and other
    kinds of adapters.
    """
    lora_alone(adapters, "peft's form")
    tensors = {}
    for name, adapter in adapters.items():
        kernel = [1] * (adapter.down.dim() - 2)
        if adapter.is_depthwise:
            raise LoraFileError(f"{name} is a depthwise convolution, which peft adapts differently: use lora-merged")
        if adapter.by_columns:
            raise LoraFileError(
                f"{name} is adapted with DoRA by input columns, peft's DoRA goes by rows: use lora-merged"
            )
        tensors |= {
            f"{prefix}{name}.lora_A.weight": adapter.down,
            f"{prefix}{name}.lora_B.weight": adapter.up.view(*adapter.up.shape, *kernel),
        }
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude.view(1, -1, *kernel) if kernel else adapter.magnitude
            tensors[f"{prefix}{name}.lora_magnitude_vector"] = magnitude
    stabilised = all(adapter.rank_stabilised for adapter in adapters.values())
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    alphas = {name: adapter.alpha if stabilised else adapter.plain_alpha for name, adapter in adapters.items()}
    return tensors, {
        "peft_type": "LORA",
        "r": next(iter(ranks.values())),
        "lora_alpha": next(iter(alphas.values())),
        "rank_pattern": ranks if len(set(ranks.values())) > 1 else {},
        "alpha_pattern": alphas if len(set(alphas.values())) > 1 else {},
        "target_modules": list(adapters),
        "use_rslora": stabilised,
        "use_dora": any(adapter.magnitude is not None for adapter in adapters.values()),
        "inference_mode": True,
    }


# ---------------------------------------------------------------- reading


def check(config: Mapping) -> None:
    """Raises LoraFileError for a config of something else than LoRA, or of parts that are not read."""
    kind, start, bias = (config.get(key) for key in ("peft_type", "init_lora_weights", "bias"))
    if kind not in (None, "LORA"):
        raise LoraFileError(f"its {CONFIG} says peft_type {shortened(str(kind))}: only LORA is read")
    if isinstance(start, str) and start.lower().startswith(_CHANGE_THE_BASE):
        raise LoraFileError(
            f"init_lora_weights {shortened(start)} changed the base too: convert it to a plain LoRA with peft"
        )
    if bias not in (None, "none"):
        raise LoraFileError(f"it was trained with bias {shortened(str(bias))}: the trained biases have no place here")
    for key in ("modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication", "trainable_token_indices"):
        if config.get(key):
            raise LoraFileError(f"it was trained with {key}: {shortened(str(config[key]))}, which has no place here")


def alpha_of(config: Mapping, layer: str, rank: int) -> float:
    """The alpha of a layer: a pattern is a regular expression on the end of a name, after a dot.

    Raises LoraFileError where the config speaks of another rank.
    """
    said = _matching(config, "rank_pattern", layer, config.get("r", rank))
    if said != rank:
        raise LoraFileError(f"{layer} has rank {rank}, but {CONFIG} says {brief(said)}")
    alpha = _matching(config, "alpha_pattern", layer, config.get("lora_alpha", rank))
    if not is_alpha(alpha):
        raise LoraFileError(f"{CONFIG} says that {layer} has the alpha {brief(alpha)}, which is no number")
    return alpha


def _matching(config: Mapping, key: str, layer: str, default: Any) -> Any:
    patterns = config.get(key)
    if patterns and not isinstance(patterns, dict):
        raise LoraFileError(f"{CONFIG}: {key} is {brief(patterns)}; it has to name layers")
    try:
        with searching(CONFIG):
            found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", layer))
            return next(found, default)
    except re.error as error:
        raise LoraFileError(f"{CONFIG}: a pattern is no regular expression: {error}") from None
