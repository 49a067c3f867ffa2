"""TREAD: in training, a share of the tokens skips the middle blocks (arXiv:2501.04765).

    blocks 0 .. i-1      x (B, N, C)
    before block i       n of the N tokens are kept for each sample, drawn by its seed
    blocks i .. j-1      x (B, n, C), and of each argument that is per token the same rows
    after block j-1      x (B, N, C): what the blocks made of the kept tokens, the others as they entered block i
    blocks j ..          x (B, N, C)

The loss is that of all tokens. Nothing is added to the network, and drawing, like validation, uses all tokens.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from families.common.library_networks import LibraryBlock
from families.common.techniques.blocks import check_tokens, share_of_depth
from warpcore.config import Settings
from warpcore.errors import ConfigError
from warpcore.networks import HasTokens
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

PUBLISHED_START, PUBLISHED_END = 2, 24
"""Of the 28 blocks of DiT-XL/2: the route goes from block 2 to block 28 - 4."""


class TreadSettings(Settings):
    """Settings of `tread`."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the tokens that skip blocks."""
    start: NonNegativeInt | None = None
    """The first block that they skip, counted from 0; by default 2 of 28, or as large a share of another depth."""
    end: PositiveInt | None = None
    """The block before which they come back; by default 24 of 28, or as large a share."""

    def route(self, depth: int) -> range:
        """The blocks that tokens skip, of a network with `depth` blocks.

        Raises:
            ConfigError: there are no such blocks.
        """
        start = share_of_depth(PUBLISHED_START, depth) if self.start is None else self.start
        end = depth - share_of_depth(28 - PUBLISHED_END, depth) if self.end is None else self.end
        if not start < end <= depth:
            raise ConfigError(
                f"tread: from block {start} to {end} there is none to skip: the network has {depth} blocks; write "
                f"start and end with 0 <= start < end <= {depth}"
            )
        return range(start, end)


class TokenRouting:
    """Lets tokens skip blocks of a network, inside `drawn` and while it is in training mode.

    Raises:
        UserError: the network is no transformer whose blocks transform tokens, or has too few of them.
    """

    kept: Tensor | None = None
    """Places (B, n) of the tokens that the blocks of the current route see, in order; None where they see all."""

    def __init__(self, network: HasTokens, settings: TreadSettings):
        check_tokens(network, "tread")
        self.share, self.token_arguments = settings.share, network.token_arguments
        self._random: SampleRandom | None = None
        blocks = list(network.blocks)
        route = [blocks[place] for place in settings.route(len(blocks))]
        self._names = argument_names(route[0])
        # Before the hooks of FSDP, which are of the whole call, and outside of what is compiled or computed again.
        route[0].register_forward_pre_hook(self._leave, with_kwargs=True)
        for block in route:
            block.register_forward_pre_hook(self._shorten, with_kwargs=True)
        route[-1].register_forward_hook(self._rejoin)

    @contextmanager
    def drawn(self, random: SampleRandom) -> Iterator[None]:
        """Inside, tokens are drawn by the seeds of the samples, whose order is that of the network's input."""
        self._random = random
        try:
            yield
        finally:
            self._random = self.kept = None
            self._all, self._shortened = None, {}

    def _leave(self, block: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self._random is None or not block.training:
            return None
        x, *others = inputs
        self._all, self._shortened = x, {}
        self.kept = to_device(kept_tokens(self._random, x.shape[1], self.share), x.device)
        return (take_tokens(x, self.kept), *others), named

    def _shorten(self, block: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict] | None:
        if self.kept is None or not self.token_arguments:
            return None
        by_place = [self._rows_of(name, value) for name, value in zip(self._names, inputs, strict=False)]
        return tuple(by_place), {name: self._rows_of(name, value) for name, value in named.items()}

    def _rows_of(self, name: str, value: Any) -> Any:
        """An argument of a block with what belongs to the kept tokens; blocks share it, as they share the whole."""
        if name not in self.token_arguments or value is None:
            return value
        if isinstance(value, tuple):
            return tuple(self._rows_of(name, part) for part in value)
        if id(value) not in self._shortened:  # the value is kept, so that no other gets its id
            of_all = value[None] if self.token_arguments[name] == 0 else value
            self._shortened[id(value)] = value, take_tokens(of_all, self.kept)
        return self._shortened[id(value)][1]

    def _rejoin(self, block: nn.Module, inputs: tuple, made: Tensor) -> Tensor | None:
        if self.kept is None:
            return None
        dtype = torch.promote_types(self._all.dtype, made.dtype)
        places = self.kept[..., None].expand(-1, -1, made.shape[-1])
        x = self._all.to(dtype).scatter(1, places, made.to(dtype))
        self.kept, self._all, self._shortened = None, None, {}
        return x


def kept_tokens(random: SampleRandom, count: int, share: float) -> Tensor:
    """Places (B, n), in order and on the CPU, of the tokens that do not skip: n = count - round(count * share)."""
    kept = max(1, count - round(count * share))
    return random.on_cpu.normal("token routing", count).argsort(dim=1)[:, :kept].sort(dim=1).values


def take_tokens(x: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, n, C) at places (B, n) of x (B, N, C), or of (1, N, C) that all samples share."""
    x = x.expand(len(places), *x.shape[1:])
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def argument_names(block: nn.Module) -> list[str]:
    """Names of the arguments of a block, by their place."""
    call = type(block).library.forward if isinstance(block, LibraryBlock) else type(block).compute
    return list(inspect.signature(call).parameters)[1:]
