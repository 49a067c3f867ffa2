"""What a LoRA file holds, in our names and in those of other programs, both ways.

- `warpcore`: each tensor has the name of its parameter (`down_blocks.0.2.attention.attn.out_proj.lora.down`,
  `tokens.delta`); metadata says rank, alpha and the rest.
- `reference`: matrices with numbers instead of names, in the order in which the reference implementation walks the
  network; its scale is always 1 / rank.
- `comfyui`: the names of kohya's scripts, as ComfyUI, Forge and OneTrainer read them for Stage C. Their attention has
  to_q, to_k and to_v in place of one matrix.
- `peft`: peft's names for the layers of diffusers' `StableCascadeUNet`.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from modules.lora import PARTS, Place
from modules.tokens import TokenRows
from warpcore.errors import UserError


class LoraFileError(UserError):
    """A LoRA file is missing, unreadable, made for another network, or cannot be put into a format."""


@dataclass(frozen=True)
class Adapter:
    """The adapter of one weight: `down`, `up` and `magnitude` as in `modules.lora.LowRank`."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    rank_stabilised: bool = False

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scale when it is divided by the rank."""
        return self.alpha * self.rank**0.5 if self.rank_stabilised else self.alpha


@dataclass
class Lora:
    """What a LoRA file holds."""

    adapters: dict[str, Adapter]
    """By the names of their places (see `modules.lora.places`); q, k and v of an attention layer may be separate."""
    tokens: list[str] = field(default_factory=list)
    """Names of trained tokens: in brackets new ones, else tokens of the vocabulary."""
    token_initial: Tensor | None = None
    """(T, D): their rows of the embedding before training."""
    token_delta: Tensor | None = None
    """(T, D): what training added."""


# ---------------------------------------------------------------- ours

_OURS = re.compile(r"(?P<layer>.+)\.lora(?:\.(?P<part>[qkv]))?\.(?P<tensor>down|up|magnitude)")


def is_ours(names: Sequence[str]) -> bool:
    return any(_OURS.fullmatch(name) or name == "tokens.delta" for name in names)


def to_tensors(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, adapter in lora.adapters.items():
        layer, part = split_part(name)
        prefix = f"{layer}.lora.{part}." if part else f"{layer}.lora."
        own = {"down": adapter.down, "up": adapter.up, "magnitude": adapter.magnitude}
        tensors |= {prefix + part: tensor for part, tensor in own.items() if tensor is not None}
    if lora.tokens:
        tensors |= {"tokens.initial": lora.token_initial, "tokens.delta": lora.token_delta}
    return tensors


def metadata(lora: Lora) -> dict[str, str]:
    """What our file says about its tensors: JSON values, a mapping by name where adapters differ."""

    def of_all(value: Callable[[Adapter], float]) -> str:
        values = {name: value(adapter) for name, adapter in lora.adapters.items()}
        return json.dumps(values if len(set(values.values())) > 1 else next(iter(values.values()), None))

    stabilised = all(adapter.rank_stabilised for adapter in lora.adapters.values())
    return {
        "rank": of_all(lambda adapter: adapter.rank),
        "alpha": of_all(lambda adapter: adapter.alpha if stabilised else adapter.plain_alpha),
        "rank_stabilised": json.dumps(stabilised),
        "tokens": json.dumps(lora.tokens),
    }


def from_ours(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> Lora:
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _OURS.fullmatch(name):
            place = f"{match['layer']}.{match['part']}" if match["part"] else match["layer"]
            found.setdefault(place, {})[match["tensor"]] = tensor
    alpha, stabilised = json.loads(about.get("alpha", "null")), about.get("rank_stabilised") == "true"

    def adapter(place: str, own: dict[str, Tensor]) -> Adapter:
        own_alpha = alpha[place] if isinstance(alpha, dict) else alpha
        down, up = _pair(place, own)
        return Adapter(down, up, up.shape[1] if own_alpha is None else own_alpha, own.get("magnitude"), stabilised)

    return Lora(
        {place: adapter(place, own) for place, own in found.items()},
        json.loads(about.get("tokens", "[]")), tensors.get("tokens.initial"), tensors.get("tokens.delta"),
    )  # fmt: skip


def _pair(place: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    for part in ("down", "up"):
        if part not in own:
            raise LoraFileError(f"the adapter of {place} has no {part}: the file is not whole")
    return own["down"], own["up"].flatten(1)


# ---------------------------------------------------------------- the reference's numbers


def to_reference(lora: Lora, there: Mapping[str, Place], token_ids: Mapping[str, int]) -> dict[str, Tensor]:
    """`there`: the places of the network. A scale that is not 1 / rank goes into `up`, exactly if a power of two.

    Raises LoraFileError for what the format cannot express: separate q, k and v, DoRA, kernels that are not constant.
    """
    tensors: dict[str, Tensor] = {}
    adapters = fused(lora.adapters)
    for number, place in enumerate(place for place in there if place in adapters):
        adapter = adapters.pop(place)
        if adapter.magnitude is not None:
            raise LoraFileError(f"{place} is adapted with DoRA, which the reference's file cannot express")
        down = adapter.down if adapter.down.dim() == 2 else adapter.down[:, :, 0, 0]
        if adapter.down.dim() == 4 and not torch.equal(_constant_kernels(down, adapter.down.shape), adapter.down):
            raise LoraFileError(f"{place}: the reference's file holds one number per kernel, this one differs inside")
        tensors |= {f"weights.{number}.lora_down": down, f"weights.{number}.lora_up": adapter.up * adapter.plain_alpha}
    if adapters:
        raise LoraFileError(f"{next(iter(adapters))} alone is adapted, the reference's file knows whole layers only")
    if lora.tokens:
        ids = torch.tensor([token_ids[token] for token in lora.tokens])
        tensors |= {"embeddings.embeddings": lora.token_delta, "embeddings.indices": ids}
    return tensors


def from_reference(
    tensors: Mapping[str, Tensor], about: Mapping[str, str], there: Mapping[str, Place], filters: Sequence[str],
    rows: TokenRows | None,
) -> Lora:  # fmt: skip
    """`filters`: `module_filters` of its training. `rows`: made from the `train_tokens` of its training."""
    places = [place for place in there if not split_part(place)[1] and any(text in place for text in filters)]
    count = sum(name.endswith(".lora_down") for name in tensors)
    if count != len(places):
        raise LoraFileError(
            f"it has {count} numbered adapters, but {len(places)} layers of this network match {list(filters)}: "
            "give the model_version and the module_filters that it was trained with (tools/export.py lora makes a "
            "file that says them)"
        )
    alpha, stabilised = json.loads(about.get("alpha", "1")), about.get("rank_stabilised") == "true"
    adapters = {}
    for number, place in enumerate(places):
        down, up = (tensors[f"weights.{number}.lora_{part}"] for part in ("down", "up"))
        shape = (down.shape[0], *there[place].weight.shape[1:])
        if len(shape) == 4 and down.shape[1] == shape[1]:
            down = _constant_kernels(down, shape)
        own_alpha = alpha[place] if isinstance(alpha, dict) else alpha
        adapter = Adapter(down, up, own_alpha, rank_stabilised=stabilised)
        adapters[place] = replace(adapter, up=up / adapter.plain_alpha)
    if "embeddings.indices" not in tensors:
        return Lora(adapters)
    ids = tensors["embeddings.indices"].tolist()
    known = {token.id: i for i, token in enumerate(rows.tokens)} if rows else {}
    if unknown := [i for i in ids if i not in known]:
        raise LoraFileError(
            f"it trains tokens {unknown} without naming them: give the train_tokens of its training (tools/export.py "
            "lora makes a file that says them)"
        )
    order = [known[i] for i in ids]
    names = [rows.tokens[i].name for i in order]
    return Lora(adapters, names, rows.initial[order].cpu(), tensors["embeddings.embeddings"])


def _constant_kernels(down: Tensor, shape: Sequence[int]) -> Tensor:
    return down[:, :, None, None].expand(*shape).contiguous()


# ---------------------------------------------------------------- the names of other programs


def comfyui_name(place: str) -> str:
    """`down_blocks.0.2.attention.attn.q` -> `lora_prior_unet_down_blocks_0_2_attention_attn_to_q`."""
    layer, part = split_part(place)
    return "lora_prior_unet_" + (f"{layer}.to_{part}" if part else layer).replace(".", "_")


def diffusers_name(place: str) -> str:
    """`down_blocks.0.2.attention.attn.q` -> `down_blocks.0.2.attention.to_q`."""
    layer, part = split_part(place)
    return f"{layer.removesuffix('.attn')}.to_{part}" if part else layer.replace(".attn.out_proj", ".to_out.0")


def to_comfyui(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for place, adapter in split(lora.adapters).items():
        name, kernel = comfyui_name(place), adapter.down.dim() == 4
        tensors |= {
            f"{name}.lora_down.weight": adapter.down,
            f"{name}.lora_up.weight": adapter.up[:, :, None, None] if kernel else adapter.up,
            f"{name}.alpha": torch.tensor(float(adapter.plain_alpha)),
        }
        if adapter.magnitude is not None:
            tensors[f"{name}.dora_scale"] = adapter.magnitude.view(-1, *[1] * (adapter.down.dim() - 1))
    return tensors


def token_embeddings(lora: Lora) -> dict[str, dict[str, Tensor]]:
    """Each trained token as the tensors of an embedding file of ComfyUI, by the token's name without brackets."""
    if not lora.tokens:
        return {}
    rows = lora.token_initial + lora.token_delta
    names = [re.sub(r"^[\[<]|[\]>]$|</w>$", "", token) for token in lora.tokens]
    return {name: {"clip_g": row[None]} for name, row in zip(names, rows, strict=True)}


def to_peft(lora: Lora) -> tuple[dict[str, Tensor], dict]:
    """The tensors and the `adapter_config.json` of a folder that `PeftModel.from_pretrained` puts into diffusers'.

    Raises LoraFileError for a depthwise convolution, whose adapter peft builds differently.
    """
    adapters = {diffusers_name(place): adapter for place, adapter in split(lora.adapters).items()}
    tensors = {}
    for name, adapter in adapters.items():
        kernel = adapter.down.dim() == 4
        if kernel and adapter.down.shape[1] == 1 < adapter.up.shape[0]:
            raise LoraFileError(f"{name} is a depthwise convolution, which peft adapts differently")
        tensors |= {
            f"base_model.model.{name}.lora_A.weight": adapter.down,
            f"base_model.model.{name}.lora_B.weight": adapter.up[:, :, None, None] if kernel else adapter.up,
        }
        if adapter.magnitude is not None:
            magnitude = adapter.magnitude.view(1, -1, 1, 1) if kernel else adapter.magnitude
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = magnitude
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


_PREFIX = r"(?:base_model\.model\.)?(?:prior\.|unet\.|diffusion_model\.|lora_prior_unet_|lora_unet_)?"
_TENSORS = {
    "down": r"(?:lora_down|lora_A|lora\.down)(?:\.default)?\.weight",
    "up": r"(?:lora_up|lora_B|lora\.up)(?:\.default)?\.weight",
    "magnitude": r"(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)",
    "alpha": r"alpha",
}


def from_others(tensors: Mapping[str, Tensor], there: Mapping[str, Place], config: Mapping) -> Lora:
    """The names of ComfyUI, kohya, OneTrainer, diffusers and peft. `config`: of peft's `adapter_config.json`."""
    known = {}
    for place in there:
        for name in (place, diffusers_name(place), comfyui_name(place).removeprefix("lora_prior_unet_")):
            known[name.replace(".", "_")] = place
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for part, pattern in _TENSORS.items():
            if match := re.fullmatch(rf"{_PREFIX}(?P<layer>.+?)\.{pattern}", name):
                layer = match["layer"].replace(".", "_")
                if layer not in known:
                    raise LoraFileError(f"{name} is of a layer that this network does not have")
                found.setdefault(known[layer], {})[part] = tensor

    def adapter(place: str, own: dict[str, Tensor]) -> Adapter:
        down, up = _pair(place, own)
        of_config = config.get("alpha_pattern", {}).get(diffusers_name(place), config.get("lora_alpha", up.shape[1]))
        alpha = own["alpha"].item() if "alpha" in own else of_config
        magnitude = own["magnitude"].flatten() if "magnitude" in own else None
        return Adapter(down, up, alpha, magnitude, config.get("use_rslora", False))

    return Lora(fused({place: adapter(place, own) for place, own in found.items()}))


# ---------------------------------------------------------------- attention: one projection or three


def split_part(place: str) -> tuple[str, str | None]:
    """`....attn.q` -> (`....attn`, `q`); other names have no part."""
    layer, _, last = place.rpartition(".")
    return (layer, last) if last in PARTS else (place, None)


def split(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Adapters of whole attention projections as three that share their `down`."""
    separate = {}
    for place, adapter in adapters.items():
        if not place.endswith(".attn"):
            separate[place] = adapter
            continue
        magnitudes = [None] * 3 if adapter.magnitude is None else adapter.magnitude.chunk(3)
        for part, up, magnitude in zip(PARTS, adapter.up.chunk(3), magnitudes, strict=True):
            separate[f"{place}.{part}"] = replace(adapter, up=up, magnitude=magnitude)
    return separate


def fused(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Undo `split` wherever q, k and v are all there and share their `down`."""
    together: dict[str, Adapter] = {}
    for place, adapter in adapters.items():
        layer, part = split_part(place)
        parts = [adapters.get(f"{layer}.{part}") for part in PARTS]
        if part is None or None in parts or not all(_alike(adapter, other) for other in parts):
            together[place] = adapter
        elif layer not in together:
            magnitude = None if adapter.magnitude is None else torch.cat([other.magnitude for other in parts])
            together[layer] = replace(adapter, up=torch.cat([other.up for other in parts]), magnitude=magnitude)
    return together


def _alike(one: Adapter, other: Adapter) -> bool:
    return (
        (one.alpha, one.rank_stabilised, one.magnitude is None)
        == (other.alpha, other.rank_stabilised, other.magnitude is None)
        and torch.equal(one.down, other.down)
    )  # fmt: skip
