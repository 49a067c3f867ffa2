"""Our own LoRA file: each tensor has the name of its parameter, metadata says rank, alpha and the rest.

For example `down_blocks.0.2.attention.attn.out_proj.lora.down`, and `tokens.delta`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from families.common.lora_formats.adapters import (
    Lora,
    LoraFileError,
    OneAdapter,
    adapter_of,
    named_alpha,
    named_tokens,
    split_part,
)
from modules.lora import KINDS

_TENSOR = "|".join(["magnitude", *(name for kind in KINDS.values() for name in kind.factors)])
_NAME = re.compile(rf"(?P<layer>.+)\.lora(?:\.(?P<part>[qkv]))?\.(?P<tensor>{_TENSOR})")
_TOKENS = ("tokens.initial", "tokens.delta")


def is_ours(names: Sequence[str]) -> bool:
    return any(_NAME.fullmatch(name) or name in _TOKENS for name in names)


def to_tensors(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, adapter in lora.adapters.items():
        layer, part = split_part(name)
        prefix = f"{layer}.lora.{part}." if part else f"{layer}.lora."
        own = {**adapter.tensors, "magnitude": adapter.magnitude}
        tensors |= {prefix + part: tensor for part, tensor in own.items() if tensor is not None}
    if lora.tokens:
        tensors |= dict(zip(_TOKENS, (lora.token_initial, lora.token_delta), strict=True))
    return tensors


def metadata(lora: Lora) -> dict[str, str]:
    """What our file says about its tensors: JSON values, a mapping by name where adapters differ."""

    def of_all(value: Callable[[OneAdapter], float]) -> str:
        values = {name: value(adapter) for name, adapter in lora.adapters.items()}
        return json.dumps(values if len(set(values.values())) > 1 else next(iter(values.values()), None))

    stabilised = all(adapter.rank_stabilised for adapter in lora.adapters.values())
    return {
        "rank": of_all(lambda adapter: adapter.rank),
        "alpha": of_all(lambda adapter: adapter.alpha if stabilised else adapter.plain_alpha),
        "rank_stabilised": json.dumps(stabilised),
        "tokens": json.dumps(lora.tokens + lora.missing_tokens),
    } | ({} if lora.min_rank is None else {"min_rank": json.dumps(lora.min_rank)})


def from_ours(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Lora:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _NAME.fullmatch(name):
            place = f"{match['layer']}.{match['part']}" if match["part"] else match["layer"]
            found.setdefault(place, {})[match["tensor"]] = tensor
        elif name not in _TOKENS:
            raise LoraFileError(f"it holds {name}, which belongs to no adapter and no token")
    alpha, stabilised = named_alpha(about), about.get("rank_stabilised") == "true"

    def adapter(place: str, own: dict[str, Tensor]) -> OneAdapter:
        own_alpha = alpha.get(place) if isinstance(alpha, dict) else alpha
        return adapter_of(place, own, own_alpha, own.pop("magnitude", None), stabilised)

    lora = Lora({place: adapter(place, own) for place, own in found.items()})
    initial, delta = (tensors.get(name) for name in _TOKENS)
    if initial is None and delta is None:
        return lora
    if initial is None or delta is None or len(initial) != len(delta):
        raise LoraFileError(f"its tokens are not whole: {' and '.join(_TOKENS)} have a row for each")
    names = named_tokens(about)  # behind those of the rows, tokens that the file lacks
    return lora.with_tokens(names[: len(initial)], initial, delta)
