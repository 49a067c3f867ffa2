"""Stage B: the denoiser that turns the small latents of a picture into the larger latents of Stage A.

Würstchen (arXiv:2306.00637), in the enlarged form published as Stable Cascade. Constructor arguments, parameter names
and shapes are those of the official checkpoints.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from modules.blocks import Conv, PointwiseConv, TransposedConv, layer_norm, resize
from modules.unet import UNet, spread_tokens


class StageB(UNet):
    """A U-Net of convolution (C), timestep (T), attention (A) and feed-forward (F) blocks. The defaults are the 3B.

    Args:
        c_in, c_out: channels of the latents of Stage A and of the prediction.
        c_r: width of the embedding of each time condition.
        patch_size: pixels of the latents per side that make one position.
        c_cond: D, width of the condition tokens inside the network.
        c_hidden, nhead: C and attention heads of each level; heads are not used in a level without attention.
        blocks: repetitions of `level_config` per level: [way down, outer level first], [way up, inner level first].
        block_repeat: how often each level runs, in the order of `blocks`.
        level_config: kinds of blocks of each level, outer level first.
        c_clip: width of the pooled text. c_clip_seq: tokens made of each pooled vector.
        c_effnet: channels of the encoder's (or Stage C's) latents. c_pixels: channels of pictures.
        kernel_size: of the depthwise convolutions.
        dropout: per level, in the feed-forward layers and on attention weights; one number counts for all levels.
        self_attn: per level, whether positions attend to each other; one value counts for all levels.
        t_conds: names of the time conditions beside the timestep.

    The size is halved from each level to the next.
    """

    conditions = ("effnet", "clip", "pixels")

    def __init__(
        self,
        c_in: int = 4,
        c_out: int = 4,
        c_r: int = 64,
        patch_size: int = 2,
        c_cond: int = 1280,
        c_hidden: Sequence[int] = (320, 640, 1280, 1280),
        nhead: Sequence[int] = (-1, -1, 20, 20),
        blocks: Sequence[Sequence[int]] = ((2, 6, 28, 6), (6, 28, 6, 2)),
        block_repeat: Sequence[Sequence[int]] = ((1, 1, 1, 1), (3, 3, 2, 2)),
        level_config: Sequence[str] = ("CT", "CT", "CTA", "CTA"),
        c_clip: int = 1280,
        c_clip_seq: int = 4,
        c_effnet: int = 16,
        c_pixels: int = 3,
        kernel_size: int = 3,
        dropout: float | Sequence[float] = 0.0,
        self_attn: bool | Sequence[bool] = True,
        t_conds: Sequence[str] = ("sca",),
    ):
        super().__init__()
        self.c_clip_seq, self.c_pixels = c_clip_seq, c_pixels
        self.effnet_mapper = _picture_mapper(c_effnet, c_hidden[0])
        self.pixels_mapper = _picture_mapper(c_pixels, c_hidden[0])
        self.clip_mapper = nn.Linear(c_clip, c_cond * c_clip_seq)
        self.clip_norm = layer_norm(c_cond)

        def make_scaler(mode: str, level: int, c_from: int, c_to: int) -> nn.Module:
            return (Conv if mode == "down" else TransposedConv)(c_from, c_to, kernel_size=2, stride=2)

        self.build(
            c_in=c_in, c_out=c_out, c_r=c_r, patch_size=patch_size, c_cond=c_cond, c_hidden=c_hidden, nhead=nhead,
            blocks=blocks, block_repeat=block_repeat, level_config=level_config, kernel_size=kernel_size,
            dropout=dropout, self_attn=self_attn, t_conds=t_conds, make_scaler=make_scaler,
        )  # fmt: skip

    @property
    def condition_mappers(self) -> list[nn.Linear | nn.Conv2d]:
        pictures = (self.effnet_mapper, self.pixels_mapper)
        return [self.clip_mapper, *(mapper[i] for mapper in pictures for i in (0, 2))]

    def gen_c_embeddings(self, clip: Tensor) -> Tensor:
        """The condition tokens (B, L, D) of pooled text, (B, c_clip) or (B, tokens, c_clip)."""
        return self.clip_norm(spread_tokens(self.clip_mapper(clip), self.c_clip_seq))

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        effnet: Tensor,
        clip: Tensor,
        pixels: Tensor | None = None,
        **t_conds: Tensor | None,
    ) -> Tensor:
        """Predict the diffusion target of noised latents.

        Args:
            x: noised latents of Stage A (B, c_in, H, W); sides that `patch_size` divides.
            r: noise condition (B,) in [0, 1], in float32 also where the weights are not: bfloat16 would move it by
                1/256 (with FSDP's mixed precision, keep `cast_forward_inputs` off; this method casts).
            effnet: latents (B, c_effnet, h, w) of any size; zeros where there are none.
            clip: pooled text, (B, c_clip) or (B, tokens, c_clip).
            pixels: pictures (B, c_pixels, h, w) of any size; None counts as black ones.
            **t_conds: the constructor's further time conditions, each (B,); an absent one counts as 0.

        Returns (B, c_out, H, W) in the dtype the network computes in. Raises ValueError for an unknown condition.
        """
        if pixels is None:
            pixels = x.new_zeros(1, self.c_pixels, 1, 1)
        x = self.embed(x)
        # The latents are resized before their layers, the pixels after theirs.
        effnet = resize(effnet.permute(0, 2, 3, 1), x.shape[1:3]).to(self.dtype)
        pixels = self.pixels_mapper(pixels.permute(0, 2, 3, 1).to(self.dtype))
        x = x + self.effnet_mapper(effnet) + resize(pixels, x.shape[1:3])
        return self.run_levels(x, self.embed_times(r, t_conds), self.gen_c_embeddings(clip.to(self.dtype)))


def _picture_mapper(c_from: int, c: int) -> nn.Sequential:
    """(B, H, W, c_from) -> (B, H, W, c), position by position."""
    return nn.Sequential(PointwiseConv(c_from, c * 4), nn.GELU(), PointwiseConv(c * 4, c), layer_norm(c))
