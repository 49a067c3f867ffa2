"""NOVA's transformer: it draws the frames of a clip one after another, and the tokens of a frame in groups.

A video encoder reads the text and earlier frames, an image encoder those tokens of a frame that are there, and a
diffusion head draws hidden ones, each by itself. Constructor arguments, parameter names and shapes are those of the
published files. A picture is a clip of one frame.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.blocks import compile_blocks
from modules.nova_decoder import DiffusionDecoder
from modules.nova_embeddings import LabelEmbedding, MaskEmbedding, MotionEmbedding, TextEmbedding, VideoPositions
from modules.nova_encoders import ClipState, ImageEncoder, VideoEncoder

MAX_DEPTH = 1000
"""Of encoders and head: no network has as many blocks."""
HEADS = {768: 12, 1024: 16, 1536: 16}
"""Of published encoders, by their width."""
PHI_WIDTH = 2560
"""Of the states of Phi-2, which encodes the texts of published networks."""
IMAGE_1024 = {"image_size": 1024, "image_base_size": (64, 64), "video_base_size": (1, 32, 32)}
IMAGE_512 = {"image_size": 512, "image_base_size": (32, 32), "video_base_size": (1, 16, 16)}
VIDEO_480 = {"image_size": (480, 768), "image_base_size": (30, 48), "video_base_size": (16, 15, 24)}
HEAD_512 = ("vit_d16w1024", "vit_d32w1024", "mlp_d3w1280")
SIZES: dict[str, dict[str, Any]] = {
    name: {"text_token_dim": PHI_WIDTH, **numbers}
    for name, numbers in {
        **{
            f"nova-d48w{width}-sdxl1024": {
                "arch": (f"vit_d16w{width}", f"vit_d32w{width}", f"mlp_d6w{width}"),
                **IMAGE_1024,
            }
            for width in HEADS
        },
        "nova-d48w1024-sd512": {"arch": HEAD_512, **IMAGE_512},
        "nova-d48w1024-osp480": {"arch": HEAD_512, **VIDEO_480},
        "nova-d48w1024-osp480 with a mixer": {"arch": HEAD_512, "video_mixer_rank": 24, **VIDEO_480},
    }.items()
}
"""Constructor arguments by published name. A published folder says its own in config.json."""


class NOVATransformer(nn.Module):
    """The network. Times of diffusion are from 0 to 1,000.

    Args:
        arch: of video encoder, image encoder and decoder: registered names such as `vit_d16w1024` and `mlp_d6w1024`,
            or their numbers `depth`, `embed_dim` and `num_heads`.
        image_base_size: (rows, columns) of tokens in a frame. video_base_size: (frames, rows, columns) of those that
            the video encoder reads, of which each covers four.
        image_dim: C of the latents. image_size, image_stride: in pixels, of pictures and of a latent.
        text_token_dim, text_token_len: width and largest number of the text's tokens. Without a width the network is
            told one of `num_classes` classes in place of a text.
        video_mixer_rank: of the layers that let a frame scale and shift what was made of the first one; below 0 there
            is a single layer of full rank, with None and 0 none.
        rotary_pos_embed: turn queries and keys by their places, in place of sines. Other sizes than the base then
            work.

    Raises:
        ValueError: an architecture is unknown, or the sizes disagree.
    """

    conditions = ("text", "lengths", "labels", "flow", "fps")
    forward_methods = ("condition", "encode_frame", "encode_picture", "denoise")

    def __init__(
        self,
        arch: Sequence[str | Mapping[str, Any]],
        image_base_size: Sequence[int],
        video_base_size: Sequence[int],
        image_dim: int = 4,
        image_size: int | Sequence[int] | None = None,
        image_stride: int = 8,
        text_token_dim: int | None = None,
        text_token_len: int = 256,
        video_mixer_rank: int | None = None,
        rotary_pos_embed: bool = False,
        num_classes: int = 1000,
    ):
        super().__init__()
        video, image, decoder = map(_numbers, arch)
        width, self.patch = video["embed_dim"], 15 // image_stride + 1
        if image["embed_dim"] != width:
            raise ValueError(f"arch: encoders of widths {width} and {image['embed_dim']}; they have to be equal")
        self.image_base_size, self.video_base_size = tuple(image_base_size), tuple(video_base_size)
        self._check_sizes(image_size, image_stride)
        rotary = rotary_pos_embed
        self.rotary = rotary
        self.text_embed = TextEmbedding(text_token_dim, width, text_token_len) if text_token_dim else None
        self.label_embed = None if text_token_dim else LabelEmbedding(num_classes, width)
        self.motion_embed = MotionEmbedding(width) if self.video_base_size[0] > 1 else None
        self.mask_embed = MaskEmbedding(width)
        self.video_pos_embed = None if rotary else VideoPositions(self.video_base_size, width)
        self.video_encoder = VideoEncoder(image_dim, 2 * self.patch, **video, rotary=rotary, rank=video_mixer_rank)
        self.image_encoder = ImageEncoder(image_dim, self.patch, self.image_base_size, **image, rotary=rotary)
        self.image_decoder = DiffusionDecoder(
            image_dim, self.patch, width, depth=decoder["depth"], width=decoder["embed_dim"]
        )

    def _check_sizes(self, image_size: int | Sequence[int] | None, image_stride: int) -> None:
        rows, columns = self.image_base_size
        if self.video_base_size[1:] != (rows // 2, columns // 2) or rows % 2 or columns % 2:
            raise ValueError(
                f"video_base_size: {list(self.video_base_size[1:])} tokens of a frame are not half of image_base_size "
                f"{[rows, columns]}, side by side"
            )
        if image_size is None:
            return
        said = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        wanted = tuple(side * self.patch * image_stride for side in self.image_base_size)
        if said != wanted:
            raise ValueError(
                f"image_size: {list(said)} px, but image_base_size {[rows, columns]} is {list(wanted)} px"
            )

    @property
    def blocks(self) -> list[nn.Module]:
        """In the order in which tokens pass them."""
        return [*self.video_encoder.blocks, *self.image_encoder.blocks, *self.image_decoder.blocks]

    def set_activation_checkpointing(self, level: int) -> None:
        """As published, a part of the network more at each level, and never attention. 1: the MLPs of the video
        encoder; 2: those of the image encoder, too; 3: the blocks of the diffusion head, too.

        Transformers here otherwise compute whole blocks again, attention included: at 1 every second one, above all
        of them. Level 2 is nearest to that, and keeps what attention needs. Raises ValueError for another level.
        """
        if level not in (0, 1, 2, 3):
            raise ValueError(f"activation checkpointing level {level!r} does not exist: choose 0 (off), 1, 2 or 3")
        for least, part in enumerate((self.video_encoder, self.image_encoder, self.image_decoder), start=1):
            for block in part.blocks:
                block.checkpointed = level >= least

    def compile_blocks(self, graphs: bool = False) -> None:
        """MLPs of the encoders and blocks of the diffusion head; attention, which keeps keys in drawing, stays as it
        is."""
        compile_blocks(self.blocks, graphs)

    def condition(
        self,
        text: Tensor | None = None,
        lengths: Tensor | None = None,
        labels: Tensor | None = None,
        flow: Tensor | None = None,
        fps: Tensor | None = None,
    ) -> Tensor:
        """Tokens (B, L, D) that stand in front of the first frame.

        Args:
            text, lengths: encoded texts (B, N, C) and how many of their tokens count (B,); 0 is the empty text.
            labels: (B,) classes; the number of classes stands for none.
            flow: (B,) motion scores. Without them, and in a network of pictures, there are no tokens of motion.
            fps: (B,) frames a second; None: 12.
        """
        tokens = self.label_embed(labels) if self.text_embed is None else self.text_embed(text, lengths)
        if flow is None or self.motion_embed is None:
            return tokens
        return torch.cat([tokens, self.motion_embed(flow, fps)], dim=1)

    def encode_clip(self, latents: Tensor, condition: Tensor) -> Tensor:
        """What stands for each frame (B, T, M, D), made of the condition (B, L, D) and of the frames of latents
        (B, C, T, H, W) before it: the T frames at once."""
        grid = self._video_grid(latents)
        begin = self._begin(len(latents), grid)[:, None]
        earlier = self.video_encoder.patch_embed(latents[:, :, :-1])
        x = torch.cat([begin.to(earlier.dtype), earlier], dim=1)
        x = x if self.rotary else self.video_pos_embed(x)
        return self.video_encoder.all_frames(x, condition, grid)

    def encode_frame(
        self, previous: Tensor | None, condition: Tensor, clip: ClipState, unseen: Tensor | None = None
    ) -> Tensor:
        """What stands for the next frame (B, M, D) of a clip that is being drawn.

        Args:
            previous: latents (B, C, H, W) of the frame before; None for the first.
            condition: (B, L, D). clip: what is kept of earlier frames, which this call adds to.
            unseen: (B,) bool, samples that see nothing of this frame: neither the one before nor places.
        """
        grid = self.video_base_size[1:] if previous is None else self._video_grid(previous)
        begin = self._begin(len(condition), grid)
        x = begin if previous is None else self.video_encoder.patch_embed(previous)
        if not self.rotary:
            x = self.video_pos_embed.space(x) + self.video_pos_embed.times(clip.frames)[clip.frame]
        if unseen is not None:  # not even places, as published
            x = torch.where(unseen[:, None, None], begin.to(x.dtype), x)
        return self.video_encoder.next_frame(x, condition, clip, grid)

    def encode_picture(self, latents: Tensor, hidden: Tensor, visible: Tensor, condition: Tensor) -> Tensor:
        """Conditions (B, N, D) of the diffusion head for all tokens of frames (B, C, H, W).

        Args:
            hidden: (B, N) bool, tokens that are not there. visible: (B, K) the numbers of the others, in any order.
            condition: what stands for the frames (B, M, D).
        """
        x = self.image_encoder.patch_embed(latents)
        x = self.mask_embed(x, hidden)
        grid = tuple(side // self.patch for side in latents.shape[-2:])
        return self.image_encoder(self._placed(x, grid), condition, visible, grid)

    def _placed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.rotary:
            return x
        if grid != self.image_base_size:
            said, wanted = (" x ".join(map(str, size)) for size in (grid, self.image_base_size))
            raise ValueError(f"frames of {said} tokens: this network has positions for {wanted} alone")
        return self.image_encoder.pos_embed(x)

    def denoise(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predictions like the numbers x (B, N, P) of patches at times t (B, N) or (B,), by conditions (B, N, D)."""
        return self.image_decoder(x, t, z)

    def forward(
        self, latents: Tensor, hidden: Tensor, visible: Tensor, noised: Tensor, t: Tensor, **condition: Tensor | None
    ) -> Tensor:
        """Predict the diffusion target of every token of clips: all that training asks.

        Args:
            latents: (B, C, T, H, W).
            hidden, visible: of the B T frames, clip by clip: see `encode_picture`.
            noised, t: patches (R B T, N, P) and their times (R B T, N): R draws, each of all frames.
            condition: see `condition`.

        Returns (R B T, N, P). Raises ValueError for latents of another size than the network has positions for.
        """
        own = type(self)  # an instance's `forward_methods` gather weights, and let go of them, for calls from outside
        of_frames = self.encode_clip(latents, own.condition(self, **condition)).flatten(0, 1)
        z = own.encode_picture(self, latents.transpose(1, 2).flatten(0, 1), hidden, visible, of_frames)
        return own.denoise(self, noised, t, z.repeat(len(noised) // len(z), 1, 1))

    def _begin(self, samples: int, grid: tuple[int, int]) -> Tensor:
        """(B, M, D): what stands before the first frame."""
        return self.mask_embed.bos_token.expand(samples, grid[0] * grid[1], -1)

    def _video_grid(self, latents: Tensor) -> tuple[int, int]:
        rows, columns = (side // (2 * self.patch) for side in latents.shape[-2:])
        return rows, columns


def _numbers(arch: str | Mapping[str, Any]) -> dict[str, int]:
    """Depth, width, and heads of encoders, of a registered name or of a mapping."""
    if not isinstance(arch, str):
        if arch["depth"] > MAX_DEPTH:
            raise ValueError(f"arch: {arch['depth']} blocks; write at most {MAX_DEPTH}")
        return {key: arch[key] for key in ("depth", "embed_dim", "num_heads") if key in arch}
    match = re.fullmatch(r"(vit|mlp)_d(\d{1,3})w(\d{1,5})", arch)
    if not match or (match[1] == "vit" and int(match[3]) not in HEADS):
        known = ", ".join(map(str, HEADS))
        raise ValueError(
            f"arch: {arch!r} is unknown; write such as vit_d16w1024 (of width {known}), or mlp_d6w1024 for the head"
        )
    depth, width = int(match[2]), int(match[3])
    return {"depth": depth, "embed_dim": width} | ({"num_heads": HEADS[width]} if match[1] == "vit" else {})
