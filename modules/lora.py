"""Adapters of a network's layers: linear layers, attention projections and convolutions.

An adapter is the child module `lora` of the layer it changes, so all other parameters keep the names of the official
checkpoints. It is computed beside the layer; `modules.adapters` has what the kinds of adapters share.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.adapters import Kind, LoraSettings, WeightAdapter
from modules.blocks import Conv, DepthwiseConv, MultiheadAttention, PointwiseConv
from modules.float8 import Float8Linear
from modules.float8_product import Float8ProductLinear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.loha import LoHa
from modules.lokr import LoKr
from modules.low_rank import LowRank
from modules.packed import PackedLinear

KINDS: dict[Kind, type[WeightAdapter]] = {"lora": LowRank, "lokr": LoKr, "loha": LoHa}

PARTS = ("q", "k", "v")
"""The thirds of a fused attention projection, in the order of its rows."""

EVERY_LAYER = "."
"""The filter that finds every layer."""


class _Adapted:
    """A layer with the child `lora`. A layer becomes one by changing its class: its parameters stay where they are."""

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x, super().forward(x), self, self.weight, self.bias)


class AdaptedLinear(_Adapted, nn.Linear):
    pass


class _AdaptedPacked:
    """A packed layer's weight is unpacked once more only where the adapter looks at it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.lora.magnitude is None else self.weight
        return self.lora(x, super().forward(x), self, weight, self.bias)


class AdaptedFloat8Linear(_AdaptedPacked, Float8Linear):
    pass


class AdaptedFloat8ProductLinear(_AdaptedPacked, Float8ProductLinear):
    pass


class AdaptedInt8Linear(_AdaptedPacked, Int8Linear):
    pass


class AdaptedRotatedInt8Linear(_AdaptedPacked, RotatedInt8Linear):
    pass


class AdaptedPointwiseConv(_Adapted, PointwiseConv):
    pass


class AdaptedConv(_Adapted, Conv):
    pass


class AdaptedDepthwiseConv(_Adapted, DepthwiseConv):
    pass


class AdaptedConv2d(nn.Conv2d):
    """PyTorch's own convolution, on (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        output = super().forward(x).permute(0, 2, 3, 1)
        return self.lora(x.permute(0, 2, 3, 1), output, self, self.weight, self.bias).permute(0, 3, 1, 2)


class AdaptedAttention(MultiheadAttention):
    """`lora` changes the fused projection: an adapter of all its rows, or one for each of some of q, k and v."""

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.nhead, -1)).transpose(1, 2) for t in self.project(query, memory))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def project(self, query: Tensor, memory: Tensor) -> list[Tensor]:
        """q (B, N, C), and k and v (B, M, C), of `query` (B, N, C) and `memory` (B, M, C)."""
        c = query.shape[-1]
        weights, biases = self.in_proj_weight.split(c), self.in_proj_bias.split(c)
        projected = []
        for i, (x, weight, bias) in enumerate(zip((query, memory, memory), weights, biases, strict=True)):
            output = F.linear(x, weight, bias)
            if isinstance(self.lora, WeightAdapter):
                output = self.lora(x, output, self, weight, bias, slice(i * c, (i + 1) * c))
            elif PARTS[i] in self.lora:
                output = self.lora[PARTS[i]](x, output, self, weight, bias)
            projected.append(output)
        return projected


ADAPTED = {
    nn.Linear: AdaptedLinear,
    Float8Linear: AdaptedFloat8Linear,
    Float8ProductLinear: AdaptedFloat8ProductLinear,
    Int8Linear: AdaptedInt8Linear,
    RotatedInt8Linear: AdaptedRotatedInt8Linear,
    nn.Conv2d: AdaptedConv2d,
    PointwiseConv: AdaptedPointwiseConv,
    Conv: AdaptedConv,
    DepthwiseConv: AdaptedDepthwiseConv,
    MultiheadAttention: AdaptedAttention,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


@dataclass(frozen=True)
class Place:
    """A weight that an adapter can change, or its rows of queries, keys or values."""

    layer: nn.Module
    parameter: str
    """Name of the weight in the layer."""
    part: str | None = None

    @property
    def weight(self) -> Tensor:
        """(C_out, C_in[, kh, kw]), a view of the parameter."""
        weight = getattr(self.layer, self.parameter).detach()
        return weight if self.part is None else weight.chunk(3)[PARTS.index(self.part)]


def places(network: nn.Module, split_qkv: bool = False) -> dict[str, Place]:
    """Every place for an adapter, by the name of its layer; with `split_qkv` NAME.q, NAME.k and NAME.v of attention.

    In the order of the network's layers, where a layer comes after the layers in it.
    """
    found = {}

    def walk(name: str, layer: nn.Module) -> None:
        for child_name, child in layer.named_children():
            if child_name != "lora":
                walk(f"{name}.{child_name}" if name else child_name, child)
        kind = PLAIN.get(type(layer), type(layer))
        if kind is MultiheadAttention and split_qkv:
            found.update({f"{name}.{part}": Place(layer, "in_proj_weight", part) for part in PARTS})
        elif kind is MultiheadAttention:
            found[name] = Place(layer, "in_proj_weight")
        elif kind in ADAPTED:
            found[name] = Place(layer, "weight")

    walk("", network)
    return found


def choose(names: Sequence[str], filters: Sequence[str]) -> list[str]:
    """The names that a filter finds: as a part of the name, or where no name has that part, as a regular expression.

    '.' finds all of them, those too that have no dot.

    Raises ValueError for a filter that finds nothing.
    """
    if not filters:
        raise ValueError("no filter is given; write for example ['.attn'] for the attention layers")
    chosen: set[str] = set()
    for text in filters:
        part = "" if text == EVERY_LAYER else text
        found = [name for name in names if part in name] or _search(text, names)
        if not found:
            near = difflib.get_close_matches(text, names, n=4, cutoff=0.0)
            raise ValueError(f"{text!r} finds no layer that can be adapted; near names: {', '.join(near)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def _search(pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.search(pattern, name)]
    except re.error as error:
        raise ValueError(f"{pattern!r} is in no layer's name, and no regular expression: {error}") from None


def add_adapter(name: str, place: Place, settings: LoraSettings) -> WeightAdapter:
    """Put an adapter, which changes nothing yet, at a place. Raises ValueError where it does not fit."""
    kind, rows = KINDS[settings.kind], place.weight.shape[0]
    columns = place.weight.numel() // rows
    if kind.rank_is_limited and settings.rank > min(rows, columns):
        raise ValueError(
            f"rank {settings.rank} is more than {name} has, a weight of {rows} x {columns}: "
            f"its rank is at most {min(rows, columns)}"
        )
    layer = place.layer
    adapter = kind(place.weight, settings).train(layer.training)
    if type(layer) in ADAPTED:
        layer.__class__ = ADAPTED[type(layer)]
        layer.lora = adapter if place.part is None else nn.ModuleDict()
    if place.part is not None:
        layer.lora[place.part] = adapter
    return adapter


def add_adapters(network: nn.Module, filters: Sequence[str], settings: LoraSettings) -> list[str]:
    """Put an adapter at every place whose name a filter finds (see `choose`); returns those names.

    Raises ValueError for a filter that finds nothing and for a rank that a weight does not have.
    """
    found = places(network, settings.parts_apart)
    names = choose(list(found), filters)
    for name in names:
        add_adapter(name, found[name], settings)
    return names


def adapters(network: nn.Module) -> Iterator[tuple[str, Place, WeightAdapter]]:
    """The adapters in a network, by the names of their places."""
    for name, place in places(network).items():
        lora = getattr(place.layer, "lora", None)
        if isinstance(lora, WeightAdapter):
            yield name, place, lora
        elif lora is not None:
            for part, adapter in lora.items():
                yield f"{name}.{part}", Place(place.layer, place.parameter, part), adapter


def remove_adapters(network: nn.Module) -> None:
    """Leave the network as it was before `add_adapters`; merged weights stay merged."""
    for place in {id(place.layer): place for _, place, _ in adapters(network)}.values():
        del place.layer.lora
        place.layer.__class__ = PLAIN[type(place.layer)]


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Add the adapters to the weights: the network computes the same as before, as fast as without them."""
    for _, place, adapter in adapters(network):
        if isinstance(place.layer, PackedLinear):
            raise TypeError("packed weights cannot be changed: merge adapters into the weights that they were made of")
        if adapter.settings.min_rank is not None:
            raise TypeError("the change follows the noise (min_rank), and no weights do: it cannot be merged")
        if adapter.unmerged is None:
            adapter.unmerged = place.weight.clone()
            place.weight.add_(adapter.change(adapter.unmerged))


@torch.no_grad()
def unmerge(network: nn.Module) -> None:
    """Undo `merge`, exactly: the weights are again what they were, bit for bit."""
    for _, place, adapter in adapters(network):
        if adapter.unmerged is not None:
            place.weight.copy_(adapter.unmerged)
            adapter.unmerged = None


@contextmanager
def without_adapters(network: nn.Module) -> Iterator[None]:
    """Inside, the network computes as if it had no adapters (that are not merged)."""
    there = [adapter for _, _, adapter in adapters(network)]
    before = [adapter.active for adapter in there]
    for adapter in there:
        adapter.active = False
    try:
        yield
    finally:
        for adapter, active in zip(there, before, strict=True):
            adapter.active = active
