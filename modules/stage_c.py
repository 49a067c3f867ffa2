"""Stage C: the denoiser that turns text (and image) conditions into the small latents of a picture.

Würstchen (arXiv:2306.00637), in the enlarged form published as Stable Cascade. Constructor arguments, parameter names
and shapes are those of the official checkpoints.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modules.blocks import (
    AttnBlock,
    Block,
    FeedForwardBlock,
    GlobalResponseNorm,
    MultiheadAttention,
    PointwiseConv,
    ResBlock,
    TimestepBlock,
    UpDownBlock2d,
    layer_norm,
    resize,
    set_activation_checkpointing,
    time_embedding,
)


class StageC(nn.Module):
    """A U-Net of convolution (C), timestep (T), attention (A) and feed-forward (F) blocks. The defaults are the 3.6B.

    Args:
        c_in, c_out: channels of the latents and of the prediction.
        c_r: width of the embedding of each time condition.
        patch_size: pixels of the latents per side that make one position.
        c_cond: D, width of the condition tokens inside the network.
        c_hidden, nhead: C and attention heads of each level.
        blocks: repetitions of `level_config` per level: [way down, outer level first], [way up, inner level first].
        block_repeat: how often each level runs, in the order of `blocks`.
        level_config: kinds of blocks of each level, outer level first.
        c_clip_text, c_clip_text_pooled, c_clip_img: widths of the three conditions.
        c_clip_seq: tokens made of each pooled vector.
        kernel_size: of the depthwise convolutions.
        dropout: per level, in the feed-forward layers and on attention weights; one number counts for all levels.
        self_attn: per level, whether positions attend to each other; one value counts for all levels.
        t_conds: names of the time conditions beside the timestep.
        switch_level: between levels i and i + 1, whether the size is halved.
    """

    def __init__(
        self,
        c_in: int = 16,
        c_out: int = 16,
        c_r: int = 64,
        patch_size: int = 1,
        c_cond: int = 2048,
        c_hidden: Sequence[int] = (2048, 2048),
        nhead: Sequence[int] = (32, 32),
        blocks: Sequence[Sequence[int]] = ((8, 24), (24, 8)),
        block_repeat: Sequence[Sequence[int]] | None = None,
        level_config: Sequence[str] | None = None,
        c_clip_text: int = 1280,
        c_clip_text_pooled: int = 1280,
        c_clip_img: int = 768,
        c_clip_seq: int = 4,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = 0.1,
        self_attn: bool | Sequence[bool] = True,
        t_conds: Sequence[str] = ("sca", "crp"),
        switch_level: Sequence[bool] | None = None,
    ):
        super().__init__()
        levels = len(c_hidden)
        dropout, self_attn = _per_level(dropout, levels), _per_level(self_attn, levels)
        level_config = level_config or ["CTA"] * levels
        switch_level = switch_level or [False] * (levels - 1)
        repeat_down, repeat_up = block_repeat or [[1] * levels] * 2
        _check_levels(levels, nhead, *blocks, repeat_down, repeat_up, level_config, dropout, self_attn)
        self.c_r, self.t_conds, self.c_clip_seq = c_r, tuple(t_conds), c_clip_seq
        self.num_blocks_down = sum(blocks[0])

        self.clip_txt_mapper = nn.Linear(c_clip_text, c_cond)
        self.clip_txt_pooled_mapper = nn.Linear(c_clip_text_pooled, c_cond * c_clip_seq)
        self.clip_img_mapper = nn.Linear(c_clip_img, c_cond * c_clip_seq)
        self.clip_norm = layer_norm(c_cond)

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

        def make_scaler(level: int, mode: str) -> nn.Module:
            if level == 0:
                return nn.Identity()
            here, above = c_hidden[level], c_hidden[level - 1]
            c_from, c_to = (above, here) if mode == "down" else (here, above)
            return nn.Sequential(layer_norm(c_from), UpDownBlock2d(c_from, c_to, mode, switch_level[level - 1]))

        down, up = range(levels), list(reversed(range(levels)))
        self.embedding = nn.ModuleList(
            [nn.PixelUnshuffle(patch_size), PointwiseConv(c_in * patch_size**2, c_hidden[0]), layer_norm(c_hidden[0])]
        )
        self.down_downscalers = nn.ModuleList(make_scaler(level, "down") for level in down)
        self.down_blocks = nn.ModuleList(make_level(level, blocks[0][level]) for level in down)
        self.down_repeat_mappers = nn.ModuleList(make_repeat_mappers(level, repeat_down[level]) for level in down)
        self.up_blocks = nn.ModuleList(
            make_level(level, blocks[1][i], c_hidden[level] if i else 0) for i, level in enumerate(up)
        )
        self.up_repeat_mappers = nn.ModuleList(make_repeat_mappers(level, repeat_up[i]) for i, level in enumerate(up))
        self.up_upscalers = nn.ModuleList(make_scaler(level, "up") for level in up)
        self.clf = nn.ModuleList(
            [layer_norm(c_hidden[0]), PointwiseConv(c_hidden[0], c_out * patch_size**2), nn.PixelShuffle(patch_size)]
        )
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The published initialisation: the network starts by predicting zeros, whatever time it is.

        Xavier in general; the output layer and the timestep mappers 0; the last layer of each wide pair scaled by
        1/sqrt(blocks on the way down), so that the sum of all residual branches starts at the size of one. Sets every
        parameter, so a network made on the meta device is ready after `to_empty` and this.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, GlobalResponseNorm | MultiheadAttention):
                module.reset_parameters()
        for mapper in (self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper):
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

    def set_activation_checkpointing(self, level: int) -> None:
        """0 keeps all activations, 3 computes all again in the backward pass: see `modules.blocks`."""
        set_activation_checkpointing(self.blocks, level)

    def gen_r_embedding(self, r: Tensor) -> Tensor:
        """The embedding of one time condition (B,) -> (B, c_r), in float32."""
        return time_embedding(r, self.c_r)

    def gen_c_embeddings(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor) -> Tensor:
        """The condition tokens (B, L, D) of the three CLIP conditions; pooled ones may be (B, D) or (B, tokens, D)."""
        parts = [
            self.clip_txt_mapper(clip_text),
            self._spread(self.clip_txt_pooled_mapper(clip_text_pooled)),
            self._spread(self.clip_img_mapper(clip_img)),
        ]
        return self.clip_norm(torch.cat(parts, dim=1))

    def _spread(self, mapped: Tensor) -> Tensor:
        """(B, c_clip_seq * D) or (B, tokens, c_clip_seq * D) -> (B, tokens * c_clip_seq, D)."""
        return mapped.unflatten(-1, (self.c_clip_seq, -1)).flatten(1, -2)

    def _time_conditions(self, r: Tensor, conditions: dict[str, Tensor | None]) -> Tensor:
        """The embeddings of r and of each time condition beside each other; an absent condition counts as 0."""
        unknown = [name for name in conditions if name not in self.t_conds]
        if unknown:
            known = ", ".join(["clip_text", "clip_text_pooled", "clip_img", "cnet", *self.t_conds])
            raise ValueError(f"StageC has no condition named {', '.join(map(repr, unknown))}; it takes {known}")
        given = [conditions.get(name) for name in self.t_conds]
        times = [r, *(torch.zeros_like(r) if value is None else value for value in given)]
        return torch.cat([self.gen_r_embedding(time) for time in times], dim=1)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        clip_text: Tensor,
        clip_text_pooled: Tensor,
        clip_img: Tensor,
        cnet: Sequence[Tensor | None] | None = None,
        **t_conds: Tensor | None,
    ) -> Tensor:
        """Predict the diffusion target of noised latents.

        Args:
            x: noised latents (B, c_in, H, W); sides that `patch_size` divides.
            r: noise condition (B,) in [0, 1], in float32 also where the weights are not: bfloat16 would move it by
                1/256 (with FSDP's mixed precision, keep `cast_forward_inputs` off; this method casts).
            clip_text: (B, L, c_clip_text). clip_text_pooled, clip_img: (B, width) or (B, tokens, width).
            cnet: residuals (B, C, h, w) or None, one for each convolution block as it runs; the rest may be missing.
            **t_conds: the constructor's further time conditions, each (B,); an absent one counts as 0.

        Returns (B, c_out, H, W) in the dtype the network computes in. Raises ValueError for an unknown condition.
        """
        dtype = self.clf[1].weight.dtype
        # In float32 until the embedding is complete: bfloat16 cannot tell most of its angles apart.
        time = self._time_conditions(r, t_conds).to(dtype)
        tokens = self.gen_c_embeddings(clip_text.to(dtype), clip_text_pooled.to(dtype), clip_img.to(dtype))
        residuals = iter(cnet or ())

        unshuffle, mapping, norm = self.embedding
        x = norm(mapping(unshuffle(x.to(dtype)).permute(0, 2, 3, 1)))
        skips = []
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


def _check_levels(levels: int, *settings: Sequence) -> None:
    for setting in settings:
        if len(setting) != levels:
            raise ValueError(f"StageC has {levels} levels (c_hidden), but {setting} sets {len(setting)} of them")
