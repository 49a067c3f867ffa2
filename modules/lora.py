"""Low-rank adapters: LoRA (arXiv:2106.09685) on linear layers, attention projections and convolutions.

An adapter is the child module `lora` of the layer it changes, so all other parameters keep the names of the official
checkpoints. It is computed beside the layer: neither the change of a weight nor its gradient is ever made at full
size. Adapters are float32, whatever the weights are.
"""

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.blocks import Conv, DepthwiseConv, MultiheadAttention, PointwiseConv
from modules.float8 import Float8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.packed import PackedLinear

PARTS = ("q", "k", "v")
"""The thirds of a fused attention projection, in the order of its rows."""

EVERY_LAYER = "."
"""The filter that finds every layer."""


@dataclass(frozen=True)
class LoraSettings:
    """What adapters are like."""

    rank: int
    """R: an adapter of a weight (C_out, C_in) has R * (C_out + C_in) parameters."""
    alpha: float
    """The change counts alpha / R."""
    rank_stabilised: bool = False
    """It counts alpha / sqrt(R) instead, so that a higher rank does not learn more slowly (arXiv:2312.03732)."""
    dropout: float = 0.0
    """On what goes into the adapters, while training."""
    dora: bool = False
    """Also learn the length of each row of the changed weight (arXiv:2402.09353)."""
    split_qkv: bool = False
    """Three adapters for queries, keys and values of an attention layer, instead of one for the fused matrix."""
    init: Literal["zero_up", "published"] = "zero_up"
    """Both start without any change: up = 0 and down uniform, or as published down = 0 and up normal."""

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


class LowRank(nn.Module):
    """The change scale * up @ down of a weight (C_out, C_in), or (C_out, C_in / groups, kh, kw) of a convolution.

    Parameters: `down` (R, C_in) or (R, C_in / groups, kh, kw), `up` (C_out, R), and with DoRA `magnitude` (C_out,).
    """

    def __init__(self, weight: Tensor, settings: LoraSettings):
        super().__init__()
        self.settings = settings
        self.active = True
        self.unmerged: Tensor | None = None  # what `merge` has changed
        down, up = (settings.rank, *weight.shape[1:]), (weight.shape[0], settings.rank)
        device = None if weight.is_meta else weight.device  # a weight may wait for its values; adapters do not
        self.down = nn.Parameter(torch.empty(down, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.empty(up, dtype=torch.float32, device=device))
        self.magnitude = None
        if settings.dora:
            squared_norms = _matrix(weight.detach().to(torch.float32)).square().sum(dim=1)
            self.register_buffer("squared_norms", squared_norms, persistent=False)
            self.magnitude = nn.Parameter(squared_norms.sqrt())
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.settings.init == "published":
            nn.init.normal_(self.up)
            nn.init.zeros_(self.down)
        else:
            nn.init.zeros_(self.up)
            bound = self.down[0].numel() ** -0.5
            nn.init.uniform_(self.down, -bound, bound)

    def forward(
        self,
        x: Tensor,
        output: Tensor,
        layer: nn.Module,
        weight: Tensor | None,
        bias: Tensor | None,
        rows=slice(None),
    ) -> Tensor:
        """The output (..., C_out) of a layer, changed.

        Args:
            x, output: what the layer took and gave, channels last.
            weight, bias: of the layer, or those rows of them that made the output. Only DoRA looks at the weight.
            rows: the part of the adapter that belongs to them.
        """
        if not self.active or self.unmerged is not None:
            return output
        x = F.dropout(x, self.settings.dropout, self.training)
        change = _side_path(layer, x, self.down.to(x.dtype), (self.up[rows] * self.settings.scale).to(x.dtype))
        if self.magnitude is None:
            return output + change
        longer = (self.magnitude[rows] / self._norms(weight, rows) - 1).to(output.dtype)
        plain = output if bias is None else output - bias
        return output + change + longer * (plain + change)

    @torch.no_grad()
    def _norms(self, weight: Tensor, rows=slice(None)) -> Tensor:
        """The length (C_out,) of each row of the changed weight; a constant to the gradient (DoRA, section 4.3).

        |w + s u D|^2 = |w|^2 + 2 s u . (D w) + s^2 u D D' u', which needs no matrix of the weight's size.
        """
        down, up = _matrix(self.down), self.up[rows]
        mixed = F.linear(down.to(weight.dtype), _matrix(weight)).float().T
        own = up @ (down @ down.T)
        scale = self.settings.scale
        squares = self.squared_norms[rows] + 2 * scale * (up * mixed).sum(1) + scale**2 * (up * own).sum(1)
        return squares.clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def change(self, weight: Tensor) -> Tensor:
        """What merging adds to `weight`: in its shape, not that of the factors, and in float32."""
        matrix = _matrix(weight.float())
        changed = matrix + self.settings.scale * (self.up @ _matrix(self.down))
        if self.magnitude is not None:
            changed *= (self.magnitude / torch.linalg.vector_norm(changed, dim=1))[:, None]
        return (changed - matrix).view(weight.shape)


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, everything else)."""
    return weight if weight.dim() == 2 else weight.flatten(1)


def _side_path(layer: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    if not isinstance(layer, nn.Conv2d) or isinstance(layer, PointwiseConv):
        return F.linear(F.linear(x, _matrix(down)), up)
    x = x.permute(0, 3, 1, 2)
    if layer.groups > 1:  # a grouped kernel is small, and no product of smaller ones
        kernel = (up @ _matrix(down)).view(layer.weight.shape)
        return layer._conv_forward(x, kernel, None).permute(0, 2, 3, 1)
    return F.linear(layer._conv_forward(x, down, None).permute(0, 2, 3, 1), up)


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
            if isinstance(self.lora, LowRank):
                output = self.lora(x, output, self, weight, bias, slice(i * c, (i + 1) * c))
            elif PARTS[i] in self.lora:
                output = self.lora[PARTS[i]](x, output, self, weight, bias)
            projected.append(output)
        return projected


ADAPTED = {
    nn.Linear: AdaptedLinear,
    Float8Linear: AdaptedFloat8Linear,
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


def add_adapter(name: str, place: Place, settings: LoraSettings) -> LowRank:
    """Put an adapter, which changes nothing yet, at a place. Raises ValueError where it does not fit."""
    rows = place.weight.shape[0]
    columns = place.weight.numel() // rows
    if settings.rank > min(rows, columns):
        raise ValueError(
            f"rank {settings.rank} is more than {name} has, a weight of {rows} x {columns}: "
            f"its rank is at most {min(rows, columns)}"
        )
    layer = place.layer
    adapter = LowRank(place.weight, settings).train(layer.training)
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
    found = places(network, settings.split_qkv)
    names = choose(list(found), filters)
    for name in names:
        add_adapter(name, found[name], settings)
    return names


def adapters(network: nn.Module) -> Iterator[tuple[str, Place, LowRank]]:
    """The adapters in a network, by the names of their places."""
    for name, place in places(network).items():
        lora = getattr(place.layer, "lora", None)
        if isinstance(lora, LowRank):
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
