"""Drawing with a whole cascade: Stage C, then Stage B, then Stage A, one network in memory at a time."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from families.cascade import build
from families.cascade.conditions import text_conditions
from families.cascade.controlled import Control, ControlledStageC
from families.cascade.diffusion import make_diffusion
from families.cascade.inference import DrawingSettings
from families.cascade.lora_formats import Lora
from families.common.captions import cut_note
from families.common.lora import draw_with
from families.common.lora_training import add_tokens
from families.common.pictures import pad
from families.common.pipeline import Pipeline, Size, sizes_of
from families.common.sampling import draw_latents, latent_size
from modules.effnet import normalise_images
from warpcore.errors import UserError
from warpcore.random import stable_hash

logger = logging.getLogger(__name__)


class Cascade(Pipeline):
    """The networks of a cascade, each on the device only while it works.

    loras: see `cascade.lora.open_loras`; Stage C gets their changes, and the text tower their tokens.
    """

    def __init__(self, settings: DrawingSettings, loras: Sequence[tuple[Lora, float]] = ()):
        super().__init__(settings)
        self.loras = loras

    @property
    def picture_factor(self) -> int:
        """Stage B draws pictures whose sides are multiples of this many pixels; of others, it draws a little more."""
        return self._stage_a_compression * self.settings.stage_b.version.stage_b.get("patch_size", 2)

    @property
    def _stage_a_compression(self) -> int:
        return 2 ** self.settings.version.stage_a.get("levels", 2)

    def read(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The text conditions of prompts: `clip_text` (N, L, D) and `clip_text_pooled` (N, 1, P)."""
        with self.holding("text tower", build.text) as tower:
            add_tokens(tower, self.loras)
            for note in cut_note(tower, prompts, "prompts"):
                logger.warning(note)
            chunks = [
                prompts[i : i + self.settings.batch_size] for i in range(0, len(prompts), self.settings.batch_size)
            ]
            parts = [text_conditions(tower, chunk, self.device) for chunk in chunks]
        return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}

    def look(self, picture: Tensor) -> Tensor:
        """The image condition (1, 1, W) of a picture (3, H, W) in [0, 1]."""
        with self.holding("image tower", build.image) as tower:
            return tower.encode(picture[None].to(self.device))[:, None].cpu()

    def encode(self, pictures: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Stage C's latents (C, h, w), of the `sizes` (h, w) asked for, of pictures (3, H, W) in [0, 1]."""
        with self.holding("encoder", build.encoder) as encoder:
            resized = [_resize(picture, [side * encoder.compression for side in size])
                       for picture, size in zip(pictures, sizes, strict=True)]  # fmt: skip
            return self.in_batches("encoder", sizes, lambda rows: encoder(normalise_images(self.batch(resized, rows))))

    def draw_c(
        self,
        conditions: Mapping[str, Tensor],
        unconditional: Mapping[str, Tensor],
        size: Size,
        seeds: Sequence[int],
        start: Tensor | None = None,
        controls: Sequence[Control] = (),
        control_guided: bool = False,
        **sampling,
    ) -> list[Tensor]:
        """Draw Stage C's latents (C, h, w) for pictures of `size` (H, W).

        Args:
            conditions: of Stage C, (N, ...) each, or (1, ...) for all; without `clip_img`, there is no picture to see.
            unconditional: the same names, for guidance.
            start: latents (C, h, w) to begin with, see `draw_latents`; **sampling are its other arguments.
            controls: of ControlNets. control_guided: the other side of guidance is without them.
        """
        version, diffusion = self.settings.version, make_diffusion(self.settings.diffusion_target)
        with self.holding("Stage C", partial(build.stage_c, dtype=self.dtype)) as generator:
            draw_with(generator, self.loras)
            shape = (generator.c_in, *latent_size(*size, version.compression, generator.patch_size))
            nothing = {"clip_img": torch.zeros(1, 1, generator.clip_img_mapper.in_features)}
            network, controlled = generator, ({}, {})
            if controls:
                network = ControlledStageC(generator, controls, diffusion, sampling.get("shift", 1.0))
                controlled = {"control": torch.ones(1)}, {"control": torch.full((1,), float(not control_guided))}

            def draw(rows: list[int]) -> Tensor:
                first, second = (
                    self.rows(nothing | {**side} | control, rows)
                    for side, control in zip((conditions, unconditional), controlled, strict=True)
                )
                begin = None if start is None else start.to(self.device).expand(len(rows), *shape)
                return draw_latents(
                    diffusion, network, first, second, shape, [seeds[i] for i in rows], start=begin, **sampling
                )

            return self.in_batches("Stage C", [size] * len(seeds), draw)

    def preview(self, latents: Sequence[Tensor]) -> list[Tensor]:
        """Small pictures (3, 8 h, 8 w) in [0, 1] of Stage C's latents (C, h, w)."""
        with self.holding("previewer", build.previewer) as previewer:
            return self.in_batches(
                "previewer", sizes_of(latents), lambda rows: previewer(self.batch(latents, rows)).clamp(0, 1)
            )

    def draw_b(
        self,
        latents: Sequence[Tensor],
        pooled: Tensor,
        unconditional_pooled: Tensor,
        sizes: Sequence[Size],
        seeds: Sequence[int],
    ) -> list[Tensor]:
        """Draw Stage A's latents (C, h, w), a little larger where Stage B's patches want it.

        Args:
            latents: Stage C's (C, h, w), or the encoder's.
            pooled: `clip_text_pooled` (N, 1, P), or (1, 1, P) for all.
            unconditional_pooled: the same for guidance, which sees no latents at all.
            sizes: of the pictures, (H, W) in pixels.
        """
        settings = self.settings.stage_b
        diffusion = make_diffusion(settings.diffusion_target)
        compression = self._stage_a_compression
        make = partial(build.stage_b, dtype=self.dtype, key="stage_b_checkpoint_path")
        with self.holding("Stage B", make, settings) as generator:
            least = compression * generator.patch_size * 2 ** (len(generator.down_blocks) - 1)
            if min(min(size) for size in sizes) < least:
                raise UserError(f"size: Stage B cannot draw a picture whose height or width is less than {least} px")

            def draw(rows: list[int]) -> Tensor:
                effnet = self.batch(latents, rows, torch.float32)
                first = self.rows({"clip": pooled}, rows) | {"effnet": effnet}
                second = self.rows({"clip": unconditional_pooled}, rows) | {"effnet": torch.zeros_like(effnet)}
                return draw_latents(
                    diffusion, generator, first, second,
                    (generator.c_in, *latent_size(*sizes[rows[0]], compression, generator.patch_size)),
                    [stable_hash(seeds[i], "Stage B") for i in rows],  # other noise than that of Stage C
                    **self.settings.stage_b_sampling,
                )  # fmt: skip

            return self.in_batches("Stage B", [*zip(sizes, sizes_of(latents), strict=True)], draw)

    def decode(self, latents: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """Pictures (3, H, W) of `sizes` (H, W), in [0, 1], of Stage A's latents (C, h, w)."""
        with self.holding("Stage A", build.stage_a) as stage_a:
            found = self.in_batches(
                "Stage A", sizes_of(latents), lambda rows: stage_a.decode(self.batch(latents, rows))
            )
        return [picture[:, :height, :width].clamp(0, 1) for picture, (height, width) in zip(found, sizes, strict=True)]

    def rebuild(self, pictures: Sequence[Tensor]) -> list[Tensor]:
        """What Stage A alone makes of pictures (3, H, W) in [0, 1]."""
        with self.holding("Stage A", build.stage_a) as stage_a:
            whole = [pad(picture, stage_a.compression) for picture in pictures]
            found = self.in_batches(
                "Stage A", sizes_of(whole), lambda rows: stage_a.decode(stage_a.encode(self.batch(whole, rows)))
            )
        sizes = sizes_of(pictures)
        return [picture[:, :height, :width].clamp(0, 1) for picture, (height, width) in zip(found, sizes, strict=True)]


def _resize(picture: Tensor, size: Sequence[int]) -> Tensor:
    """(3, H, W) -> (3, *size)."""
    return F.interpolate(picture[None], tuple(size), mode="bilinear", antialias=True)[0]
