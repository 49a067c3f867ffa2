"""The LoRA file of the reference implementation: matrices with numbers instead of names; its scale is 1 / rank.

The numbers count the adapted layers in the order in which the reference implementation walks its network. That is the
order of `modules.lora.places`, but for the layers between the levels, which it makes after the levels' blocks.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from families.common.lora_formats.adapters import (
    Adapter,
    Lora,
    LoraFileError,
    fused,
    lora_alone,
    named_alpha,
    named_texts,
    split_part,
)
from modules.lora import Place
from modules.tokens import TokenRows

FIRST_TENSOR = "weights.0.lora_down"
_WALK = (
    "clip_txt_mapper", "clip_txt_pooled_mapper", "clip_img_mapper", "embedding",
    "down_blocks", "down_downscalers", "down_repeat_mappers", "up_blocks", "up_upscalers", "up_repeat_mappers", "clf",
)  # fmt: skip


def walked(places: Iterable[str]) -> list[str]:
    """Names of places in the order of the reference implementation."""
    return sorted(places, key=lambda place: _WALK.index(place.partition(".")[0]))


def to_reference(lora: Lora, there: Mapping[str, Place], token_ids: Mapping[str, int]) -> dict[str, Tensor]:
    """`there`: the places of the network. A scale that is not 1 / rank goes into `up`, exactly if a power of two.

    Raises LoraFileError for what the format cannot express: separate q, k and v, DoRA, LoKr and LoHa, kernels that are
    not constant.
    """
    tensors: dict[str, Tensor] = {}
    lora_alone(lora.adapters, "the reference's file")
    adapters = fused(lora.adapters, there)
    if single := next((place for place in adapters if place not in there), None):
        raise LoraFileError(
            f"{single} alone is adapted, the reference's file knows whole layers only: use lora-merged"
        )
    for number, place in enumerate(walked(adapters)):
        adapter = adapters[place]
        if adapter.magnitude is not None:
            raise LoraFileError(
                f"{place} is adapted with DoRA, which the reference's file cannot express: use lora-merged"
            )
        down = adapter.down if adapter.down.dim() == 2 else adapter.down[:, :, 0, 0]
        if adapter.down.dim() == 4 and not torch.equal(_constant_kernels(down, adapter.down.shape), adapter.down):
            raise LoraFileError(
                f"{place}: the reference's file holds one number per kernel, this one differs inside: use lora-merged"
            )
        tensors |= {f"weights.{number}.lora_down": down, f"weights.{number}.lora_up": adapter.up * adapter.plain_alpha}
    if lora.tokens:
        ids = torch.tensor([token_ids[token] for token in lora.tokens])
        tensors |= {"embeddings.embeddings": lora.token_delta, "embeddings.indices": ids}
    return tensors


def layers_in_order(lora: Lora) -> str:
    """What our metadata says of the numbers: a JSON list of the layers, so that our files need no filters."""
    return json.dumps(walked(fused(lora.adapters)))


def from_reference(
    tensors: Mapping[str, Tensor], about: Mapping[str, str], there: Mapping[str, Place], filters: Sequence[str],
    rows: TokenRows | None,
) -> Lora:  # fmt: skip
    """`filters`: `module_filters` of its training. `rows`: made from the `train_tokens` of its training."""
    count = sum(name.endswith(".lora_down") for name in tensors)
    known = {f"weights.{i}.lora_{part}" for i in range(count) for part in ("down", "up")}
    if unknown := tensors.keys() - known - {"embeddings.embeddings", "embeddings.indices"}:
        raise LoraFileError(f"it holds {min(unknown)}, which no file of the reference implementation has")
    places = _numbered(about, there, filters)
    if count != len(places):
        raise LoraFileError(
            f"it has {count} numbered adapters, but {len(places)} layers of this network match {list(filters)}: "
            "give the model_version and the module_filters that it was trained with (tools/export.py lora makes a "
            "file that says them)"
        )
    alpha, stabilised = named_alpha(about), about.get("rank_stabilised") == "true"
    adapters = {}
    for number, place in enumerate(places):
        if place not in there:
            raise LoraFileError(f"it was made for another network: this one has no layer {place}")
        down, up = (tensors.get(f"weights.{number}.lora_{part}") for part in ("down", "up"))
        if down is None or up is None:
            raise LoraFileError(f"number {number} has no lora_up or no lora_down: the file is not whole")
        if down.dim() < 2 or up.dim() != 2:
            raise LoraFileError(f"number {number} has tensors of {down.dim()} and {up.dim()} dimensions: no matrices")
        shape = (down.shape[0], *there[place].weight.shape[1:])
        if len(shape) == 4 and down.shape[1] == shape[1]:
            down = _constant_kernels(down, shape)
        own_alpha = alpha.get(place) if isinstance(alpha, dict) else alpha
        adapter = Adapter(down, up, 1 if own_alpha is None else own_alpha, rank_stabilised=stabilised)
        adapters[place] = replace(adapter, up=up / adapter.plain_alpha)
    return _with_tokens(Lora(adapters), tensors, rows)


def _numbered(about: Mapping[str, str], there: Mapping[str, Place], filters: Sequence[str]) -> list[str]:
    """The layers of the numbers 0, 1, ... of a file."""
    if "layers" in about:
        return named_texts(about, "layers")
    found = [place for place in there if not split_part(place)[1] and any(text in place for text in filters)]
    return found if "alpha" in about else walked(found)  # files of ours that name no layers have our order


def _with_tokens(lora: Lora, tensors: Mapping[str, Tensor], rows: TokenRows | None) -> Lora:
    ids = tensors.get("embeddings.indices", torch.empty(0)).flatten().tolist()
    if not ids:
        return lora
    if "embeddings.embeddings" not in tensors:
        raise LoraFileError(f"it names {len(ids)} tokens without their embeddings: the file is not whole")
    known = {token.id: i for i, token in enumerate(rows.tokens)} if rows else {}
    if unknown := [i for i in ids if i not in known]:
        raise LoraFileError(
            f"it trains tokens {unknown} without naming them: give the train_tokens of its training (tools/export.py "
            "lora makes a file that says them)"
        )
    order = [known[i] for i in ids]
    return lora.with_tokens(
        [rows.tokens[i].name for i in order], rows.initial[order].cpu(), tensors["embeddings.embeddings"]
    )


def _constant_kernels(down: Tensor, shape: Sequence[int]) -> Tensor:
    return down[:, :, None, None].expand(*shape).contiguous()
