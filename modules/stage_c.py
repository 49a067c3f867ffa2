"""Stage C: the denoiser that turns text (and image) conditions into the small latents of a picture.

Würstchen (arXiv:2306.00637), in the enlarged form published as Stable Cascade. Constructor arguments, parameter names
and shapes are those of the official checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modules.blocks import UpDownBlock2d, layer_norm
from modules.unet import UNet, spread_tokens


class StageC(UNet):
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

    conditions = ("clip_text", "clip_text_pooled", "clip_img", "cnet")

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
        switch_level = switch_level or [False] * (levels - 1)
        self.c_clip_seq = c_clip_seq
        self.clip_txt_mapper = nn.Linear(c_clip_text, c_cond)
        self.clip_txt_pooled_mapper = nn.Linear(c_clip_text_pooled, c_cond * c_clip_seq)
        self.clip_img_mapper = nn.Linear(c_clip_img, c_cond * c_clip_seq)
        self.clip_norm = layer_norm(c_cond)

        def make_scaler(mode: str, level: int, c_from: int, c_to: int) -> nn.Module:
            return UpDownBlock2d(c_from, c_to, mode, enabled=switch_level[level - 1])

        self.build(
            c_in=c_in, c_out=c_out, c_r=c_r, patch_size=patch_size, c_cond=c_cond, c_hidden=c_hidden, nhead=nhead,
            blocks=blocks, block_repeat=block_repeat, level_config=level_config or ["CTA"] * levels,
            kernel_size=kernel_size, dropout=dropout, self_attn=self_attn, t_conds=t_conds, make_scaler=make_scaler,
        )  # fmt: skip

    @property
    def condition_mappers(self) -> list[nn.Linear]:
        return [self.clip_txt_mapper, self.clip_txt_pooled_mapper, self.clip_img_mapper]

    def gen_c_embeddings(self, clip_text: Tensor, clip_text_pooled: Tensor, clip_img: Tensor) -> Tensor:
        """The condition tokens (B, L, D) of the three CLIP conditions; pooled ones may be (B, D) or (B, tokens, D)."""
        parts = [
            self.clip_txt_mapper(clip_text),
            spread_tokens(self.clip_txt_pooled_mapper(clip_text_pooled), self.c_clip_seq),
            spread_tokens(self.clip_img_mapper(clip_img), self.c_clip_seq),
        ]
        return self.clip_norm(torch.cat(parts, dim=1))

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
        clip = (condition.to(self.dtype) for condition in (clip_text, clip_text_pooled, clip_img))
        return self.run_levels(self.embed(x), self.embed_times(r, t_conds), self.gen_c_embeddings(*clip), cnet or ())
