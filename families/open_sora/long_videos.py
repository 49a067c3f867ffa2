"""Videos clip by clip: each is drawn around frames of references, and goes on from the end of the clip before."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from families.common.mask_strategies import Placement
from families.common.pictures import to_uint8
from families.common.transformer_lora import built_with
from families.common.wan_autoencoder import check_frames
from families.open_sora import build
from families.open_sora.autoencoder import ClipAutoencoder
from families.open_sora.conditions import Conditions, Denoiser, of_clips
from families.open_sora.drawing import OpenSoraNetworks
from families.open_sora.prompts import ClipPrompt
from families.open_sora.references import given_frames
from families.open_sora.sampling import draw_clips
from warpcore.errors import UserError
from warpcore.progress_bar import ProgressBar
from warpcore.random import stable_hash

CONDITION_KEY = "condition_frame_length"


@dataclass(frozen=True)
class Video:
    """One of the videos to draw."""

    prompt: ClipPrompt
    references: Sequence[Tensor]
    """The frames of each of its references, uint8 (T, 3, H, W)."""
    seed: int


@dataclass(frozen=True)
class Plan:
    """How all of them are drawn."""

    size_px: tuple[int, int, int]
    """(T, H, W) of each clip, which the network is told."""
    fps: float
    loops: int = 1
    """Clips of a video."""
    condition: int = 0
    """Latent frames that a clip takes over of the one before."""
    edit: float = 0.0
    """The share of noise from which these are drawn again; 0 keeps them."""
    negative: str = ""
    """What guidance leads away from; the empty text is the network's own."""
    shift: float = 1.0
    """Of times, beside that by size."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Other arguments of `draw_latents`."""


def condition_of(autoencoder: ClipAutoencoder, frames: int, wanted: int | None) -> int:
    """Latent frames that a clip of `frames` takes over of the one before; by default a window of the autoencoder, or
    where there are none two, or where each frame is one five.

    Raises:
        UserError: windows would be cut, or nothing new is left to draw.
    """
    align = autoencoder.align
    length = {None: 2, 1: 5}.get(align, align) if wanted is None else wanted
    if length % (align or 1):
        raise UserError(
            f"{CONDITION_KEY}: {length}; the latents of a window belong together: write a multiple of {align}"
        )
    if autoencoder.frames_of(length) >= frames:
        raise UserError(
            f"{CONDITION_KEY}: {length} latent frames are {autoencoder.frames_of(length)} frames, and a clip has "
            f"{frames}: nothing new would be drawn; write less, or more num_frames"
        )
    return length


def total_frames(autoencoder: ClipAutoencoder, plan: Plan) -> int:
    """Of each video: what a clip takes over is there once."""
    again = autoencoder.frames_of(plan.condition) if plan.loops > 1 else 0
    return plan.loops * plan.size_px[0] - (plan.loops - 1) * again


def check_clip_frames(autoencoder: ClipAutoencoder, frames: int) -> None:
    """Raise UserError for clips of a number of frames that the autoencoder does not take."""
    if autoencoder.align is None:
        check_frames(frames, "num_frames")


class VideoNetworks(OpenSoraNetworks):
    """The networks of Open-Sora; denoiser and autoencoder take turns, clip by clip."""

    def draw_videos(
        self,
        videos: Sequence[Video],
        plan: Plan,
        finished: Callable[[int, np.ndarray], None],
        group: ProcessGroup | None = None,
    ) -> None:
        """Draw videos, and hand over the number of each and its frames, uint8 (T, H, W, 3), when it is drawn.

        group: the processes whose denoiser works on each video together.
        """
        texts = {one.prompt.text_of(loop) for one in videos for loop in range(plan.loops)}
        texts = sorted(texts | ({plan.negative} if plan.negative else set()))
        conditions, most = self.read(texts), self.settings.batch_size
        told = {text: {name: rows[i, None] for name, rows in conditions.items()} for i, text in enumerate(texts)}
        batches = [range(start, min(start + most, len(videos))) for start in range(0, len(videos), most)]
        make = partial(built_with, build.network, self.loras, dtype=self.dtype)
        with (
            self.holding("denoiser", make) as network,
            self.holding("autoencoder", self.build_autoencoder) as autoencoder,
        ):
            if group is not None:
                network.split_sequence(group)
            drawing = _Drawing(self, Denoiser(network, self.settings.version), autoencoder, plan, told)
            for rows in ProgressBar(batches, desc="videos", unit="batch"):
                clips = list(drawing.clips([videos[row] for row in rows]))
                for row, video in zip(rows, zip(*clips, strict=True), strict=True):
                    finished(row, to_uint8(torch.cat(video)))


class _Drawing:
    """The clips of a batch, one after another."""

    def __init__(
        self,
        networks: VideoNetworks,
        network: Denoiser,
        autoencoder: ClipAutoencoder,
        plan: Plan,
        told: Mapping[str, Conditions],
    ):
        self.networks, self.network, self.autoencoder, self.plan, self.told = (
            networks, network, autoencoder, plan, told,
        )  # fmt: skip
        self.diffusion = build.process(networks.settings)
        frames, *sides = plan.size_px
        self.shape = (
            autoencoder.latent_channels, autoencoder.latent_frames(frames),
            *(side // autoencoder.compression for side in sides),
        )  # fmt: skip

    def clips(self, videos: Sequence[Video]) -> Iterator[Tensor]:
        """The clips of some videos, uint8 (B, T, 3, H, W) on the CPU, without what a clip takes over."""
        plan, again = self.plan, 0
        references, placements = ([list(one) for one in of_all] for of_all in (
            [video.references for video in videos], [video.prompt.placements for video in videos],
        ))  # fmt: skip
        for loop in range(plan.loops):
            given = self._given(references, placements, loop)
            clip = self._decoded(self._latents(videos, loop, given))
            yield clip[:, again:]
            if loop + 1 == plan.loops:
                return
            again = self.autoencoder.frames_of(plan.condition)
            for one, of_references, of_placements in zip(clip, references, placements, strict=True):
                of_references.append(one[len(one) - again :])
                of_placements.append(
                    Placement(loop + 1, len(of_references) - 1, -plan.condition, 0, plan.condition, plan.edit)
                )

    def _given(
        self, references: Sequence[Sequence[Tensor]], placements: Sequence[Sequence[Placement]], loop: int
    ) -> tuple[Tensor, Tensor] | None:
        """The given frames of each clip; None where no clip has any."""
        if not any(placement.loop == loop for of_one in placements for placement in of_one):
            return None
        anything = torch.zeros(self.shape)
        made = [
            given_frames(anything, clips, of_one, self._encoded, loop, self.autoencoder.align)
            for clips, of_one in zip(references, placements, strict=True)
        ]
        return tuple(map(torch.stack, zip(*made, strict=True)))

    def _encoded(self, clip: Tensor) -> Tensor:
        """Latents (C, t, h, w) of a clip, uint8 (T, 3, H, W): the means of the autoencoder's moments."""
        return self.autoencoder.scale.latents(self.autoencoder.clip_moments(clip[None], None), None)[0].cpu()

    def _latents(self, videos: Sequence[Video], loop: int, given: tuple[Tensor, Tensor] | None) -> Tensor:
        plan, device, settings = self.plan, self.networks.device, self.networks.settings
        texts = [self.told[video.prompt.text_of(loop)] for video in videos]
        conditions = {name: torch.cat([text[name] for text in texts]) for name in texts[0]}
        conditions |= of_clips(plan.size_px, torch.full((len(videos),), plan.fps))
        conditions = {name: rows.to(device) for name, rows in conditions.items()}
        away = self.told.get(plan.negative) if plan.negative else None
        if away is not None:
            away = {name: rows.to(device).expand_as(conditions[name]) for name, rows in away.items()}
        return draw_clips(
            self.diffusion, self.network, conditions, self.shape,
            [video.seed if loop == 0 else stable_hash(video.seed, "loop", loop) for video in videos], away=away,
            shift=plan.shift * build.drawing_shift(settings, plan.size_px, self.shape[1]), given_frames=given,
            **plan.sampling,
        )  # fmt: skip

    def _decoded(self, latents: Tensor) -> Tensor:
        """Clips, uint8 (B, T, 3, H, W) on the CPU: one window of one clip is decoded at a time."""
        frames = self.plan.size_px[0]
        return torch.stack([
            torch.cat([
                (window[0].clamp(0, 1) * 255).round().byte().cpu()
                for window in self.autoencoder.decoded_windows(one[None].float(), frames)
            ]) for one in latents
        ])  # fmt: skip
