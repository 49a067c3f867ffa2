"""The U-Net that Stage B and Stage C share: everything but their conditions.

Würstchen (arXiv:2306.00637), in the enlarged form published as Stable Cascade. Parameter names and shapes are those of
the official checkpoints.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from modules.blocks import (
    AttnBlock,
    Block,
    FeedForwardBlock,
    MultiheadAttention,
    PointwiseConv,
    ResBlock,
    TimestepBlock,
    compile_blocks,
    layer_norm,
    resize,
    set_activation_checkpointing,
    time_embedding,
)
from modules.feed_forward import GlobalResponseNorm


class UNet(nn.Module):
    """Levels of convolution (C), timestep (T), attention (A) and feed-forward (F) blocks, a skip between equal levels.

    A subclass makes the layers for its conditions, then calls `build`. It names its conditions and these layers in
    `conditions` and `condition_mappers`; its `forward` is `embed`, conditions, `run_levels`.
    """

    conditions: tuple[str, ...] = ()  # those of `forward`, beside the time conditions

    def build(
        self,
        *,
        c_in: int,
        c_out: int,
        c_r: int,
        patch_size: int,
        c_cond: int,
        c_hidden: Sequence[int],
        nhead: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_repeat: Sequence[Sequence[int]] | None,
        level_config: Sequence[str],
        kernel_size: int,
        dropout: float | Sequence[float],
        self_attn: bool | Sequence[bool],
        t_conds: Sequence[str],
        make_scaler: Callable[[str, int, int, int], nn.Module],
    ) -> None:
        """Make the layers and initialise the network.

        Args:
            make_scaler: `make_scaler(mode, level, c_from, c_to)` is the layer, on (B, H, W, C), that changes width and
                size between levels `level - 1` and `level`, with mode "down" or "up".
            others: see the subclasses.
        """
        levels = len(c_hidden)
        dropout, self_attn = _per_level(dropout, levels), _per_level(self_attn, levels)
        repeat_down, repeat_up = block_repeat or [[1] * levels] * 2
        self._check_levels(levels, nhead, *blocks, repeat_down, repeat_up, level_config, dropout, self_attn)
        self.c_in, self.c_r, self.patch_size, self.t_conds = c_in, c_r, patch_size, tuple(t_conds)

        def make_block(kind: str, level: int, c_skip: int) -> Block:
            c, drop = c_hidden[level], dropout[level]
            match kind:
                case "C":
                    return ResBlock(c, c_skip, kernel_size, drop)
                case "T":
                    return TimestepBlock(c, c_r, self.t_conds)
                case "A":
                    return AttnBlock(c, c_cond, nhead[level], self_attn[level], drop)
                case "F":
                    return FeedForwardBlock(c, drop)
            raise ValueError(f"level_config {level_config[level]!r}: {kind!r} is no kind of block; write C, T, A or F")

        def make_level(level: int, repetitions: int, c_skip: int = 0) -> nn.ModuleList:
            kinds = level_config[level] * repetitions
            return nn.ModuleList(make_block(kind, level, 0 if i else c_skip) for i, kind in enumerate(kinds))

        def make_repeat_mappers(level: int, repeats: int) -> nn.ModuleList:
            return nn.ModuleList(PointwiseConv(c_hidden[level], c_hidden[level]) for _ in range(repeats - 1))

        def make_normed_scaler(mode: str, level: int) -> nn.Module:
            if level == 0:
                return nn.Identity()
            here, above = c_hidden[level], c_hidden[level - 1]
            c_from, c_to = (above, here) if mode == "down" else (here, above)
            return nn.Sequential(layer_norm(c_from), make_scaler(mode, level, c_from, c_to))

        down, up = range(levels), list(reversed(range(levels)))
        self.embedding = nn.ModuleList(
            [nn.PixelUnshuffle(patch_size), PointwiseConv(c_in * patch_size**2, c_hidden[0]), layer_norm(c_hidden[0])]
        )
        self.down_downscalers = nn.ModuleList(make_normed_scaler("down", level) for level in down)
        self.down_blocks = nn.ModuleList(make_level(level, blocks[0][level]) for level in down)
        self.down_repeat_mappers = nn.ModuleList(make_repeat_mappers(level, repeat_down[level]) for level in down)
        self.up_blocks = nn.ModuleList(
            make_level(level, blocks[1][i], c_hidden[level] if i else 0) for i, level in enumerate(up)
        )
        self.up_repeat_mappers = nn.ModuleList(make_repeat_mappers(level, repeat_up[i]) for i, level in enumerate(up))
        self.up_upscalers = nn.ModuleList(make_normed_scaler("up", level) for level in up)
        self.clf = nn.ModuleList(
            [layer_norm(c_hidden[0]), PointwiseConv(c_hidden[0], c_out * patch_size**2), nn.PixelShuffle(patch_size)]
        )
        self.num_blocks_down = sum(blocks[0])
        self.init_weights()

    @property
    def condition_mappers(self) -> list[nn.Linear | nn.Conv2d]:
        """The layers that conditions other than the time pass through, which start small."""
        raise NotImplementedError

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: the network starts by predicting zeros, whatever time it is.

        Xavier in general; PyTorch's own for transposed convolutions; the output layer and the timestep mappers 0; the
        last layer of each wide pair scaled by 1/sqrt(blocks on the way down), so that the sum of all residual branches
        starts at the size of one. Sets every parameter, so a network made on the meta device is ready after `to_empty`
        and this.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.ConvTranspose2d | GlobalResponseNorm | MultiheadAttention):
                module.reset_parameters()
        for mapper in self.condition_mappers:
            nn.init.normal_(mapper.weight, std=0.02)
        nn.init.xavier_uniform_(self.embedding[1].weight, gain=0.02)
        nn.init.zeros_(self.clf[1].weight)
        for block in self.blocks:
            if isinstance(block, ResBlock | FeedForwardBlock):
                block.channelwise[-1].weight.mul_(math.sqrt(1 / self.num_blocks_down))
            elif isinstance(block, TimestepBlock):
                for name in block.names:
                    nn.init.zeros_(getattr(block, name).weight)

    @property
    def blocks(self) -> list[Block]:
        """All blocks in the order they run: what `compile`, `fully_shard` and checkpointing are applied to."""
        return [block for level in (*self.down_blocks, *self.up_blocks) for block in level]

    @property
    def residual_widths(self) -> list[int]:
        """Channels of each convolution block, as they run: where a ControlNet's residuals go."""
        levels = [*self.down_blocks, *self.up_blocks]
        repeats = [1 + len(mappers) for mappers in (*self.down_repeat_mappers, *self.up_repeat_mappers)]
        runs = [block for level, repeat in zip(levels, repeats, strict=True) for block in [*level] * repeat]
        return [block.depthwise.out_channels for block in runs if isinstance(block, ResBlock)]

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the network computes in."""
        return self.clf[1].weight.dtype

    def set_activation_checkpointing(self, level: int) -> None:
        """0 keeps all activations, 3 computes all again in the backward pass: see `modules.blocks`."""
        set_activation_checkpointing(self.blocks, level)

    def compile_blocks(self, graphs: bool = False) -> None:
        """Let `torch.compile` fuse what the blocks compute; with `graphs`, training replays it as CUDA graphs."""
        compile_blocks(self.blocks, graphs)

    def gen_r_embedding(self, r: Tensor) -> Tensor:
        """The embedding of one time condition (B,) -> (B, c_r), in float32."""
        return time_embedding(r, self.c_r)

    def embed_times(self, r: Tensor, t_conds: dict[str, Tensor | None]) -> Tensor:
        """The embeddings of r and of each time condition beside each other; an absent condition counts as 0.

        All are (B,), the result is (B, c_r * (1 + conditions)). Raises ValueError for a condition that the network
        does not have.
        """
        unknown = [name for name in t_conds if name not in self.t_conds]
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no condition named {', '.join(map(repr, unknown))}; it takes "
                f"{', '.join((*self.conditions, *self.t_conds))}"
            )
        given = [t_conds.get(name) for name in self.t_conds]
        times = [r, *(torch.zeros_like(r) if value is None else value for value in given)]
        # In float32 until the embedding is complete: bfloat16 cannot tell most of its angles apart.
        return torch.cat([self.gen_r_embedding(time) for time in times], dim=1).to(self.dtype)

    def embed(self, x: Tensor) -> Tensor:
        """Noised latents (B, c_in, H, W) -> (B, H / patch_size, W / patch_size, C)."""
        unshuffle, mapping, norm = self.embedding
        return norm(mapping(unshuffle(x.to(self.dtype)).permute(0, 2, 3, 1)))

    def run_levels(self, x: Tensor, time: Tensor, tokens: Tensor, residuals: Iterable[Tensor | None] = ()) -> Tensor:
        """Embedded latents, times (B, c_timestep) and condition tokens (B, L, D) -> prediction (B, c_out, H, W).

        residuals: of a ControlNet, (B, C, h, w) or None, one for each convolution block as it runs; the rest may be
            missing.
        """
        residuals, skips = iter(residuals), []
        for scaler, level, mappers in zip(
            self.down_downscalers, self.down_blocks, self.down_repeat_mappers, strict=True
        ):
            x = _run_level(level, mappers, scaler(x), None, time, tokens, residuals)
            skips.append(x)
        skips[-1] = None  # the innermost level goes straight on
        for scaler, level, mappers in zip(self.up_upscalers, self.up_blocks, self.up_repeat_mappers, strict=True):
            x = scaler(_run_level(level, mappers, x, skips.pop(), time, tokens, residuals))

        norm, mapping, shuffle = self.clf
        return shuffle(mapping(norm(x)).permute(0, 3, 1, 2))

    def _check_levels(self, levels: int, *settings: Sequence) -> None:
        for setting in settings:
            if len(setting) != levels:
                raise ValueError(
                    f"{type(self).__name__} has {levels} levels (c_hidden), but {setting} sets {len(setting)} of them"
                )


def spread_tokens(mapped: Tensor, tokens_each: int) -> Tensor:
    """Mapped pooled vectors (B, tokens_each * D) or (B, N, tokens_each * D) -> tokens (B, N * tokens_each, D)."""
    return mapped.unflatten(-1, (tokens_each, -1)).flatten(1, -2)


def _run_level(
    level: nn.ModuleList,
    repeat_mappers: nn.ModuleList,
    x: Tensor,
    skip: Tensor | None,
    time: Tensor,
    tokens: Tensor,
    residuals: Iterator[Tensor | None],
) -> Tensor:
    """Run the blocks of one level, again after each repeat mapper. The first block gets the skip each time."""
    for mapper in (None, *repeat_mappers):
        if mapper is not None:
            x = mapper(x)
        for i, block in enumerate(level):
            block_skip = skip if i == 0 else None
            if isinstance(block, ResBlock):
                if block_skip is not None:
                    x = resize(x, block_skip.shape[1:3])
                x = _add_residual(x, next(residuals, None))
            x = block(x, block_skip, time, tokens)
    return x


def _add_residual(x: Tensor, residual: Tensor | None) -> Tensor:
    """Add a ControlNet's residual (B, C, h, w), resized to the positions of x (B, H, W, C)."""
    if residual is None:
        return x
    return x + resize(residual.permute(0, 2, 3, 1), x.shape[1:3]).to(x.dtype)


def _per_level(value: float | bool | Sequence, levels: int) -> list:
    return [value] * levels if isinstance(value, int | float) else list(value)
