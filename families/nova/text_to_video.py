"""Clips for prompts by NOVA: out of a run, or a published folder; also from a given first frame on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import NonNegativeFloat, model_validator
from torch.distributed import ProcessGroup

from families.common.pictures import read_picture, to_pictures
from families.common.text_to_video import SEVERAL_FRAMES, Finished, TextToVideoConfig
from families.nova.autoencoder import autoencoder
from families.nova.drawing import NovaNetworks, Plan
from families.nova.inference import NovaDrawingConfig
from modules.nova_embeddings import DEFAULT_FPS
from warpcore.config_keys import MicroBatchSize, SidePx
from warpcore.files import why_no_file
from warpcore.meta import only_shapes


class NovaTextToVideoConfig(NovaDrawingConfig, TextToVideoConfig):
    """Keys of `inference/text_to_video.py` for NOVA."""

    needs = {"first_frames": SEVERAL_FRAMES}

    image_size: SidePx | tuple[SidePx, SidePx] | None = None
    """[height, width] of the frames in pixels, or the side of a square. By default that of the training."""
    batch_size: MicroBatchSize = 1
    """Videos that go through the network at once."""
    motion: NonNegativeFloat | None = None
    """The motion score that the network is told, `flow` in caches: 5 by default, and of a run its `sample_flow`.
    A run without `motion_column` learned none, and is told none."""
    first_frames: list[Path] = []
    """Pictures that clips go on from: one for all prompts, or one for each. They are scaled to cover the frames, and
    their middle is cut out."""

    @model_validator(mode="after")
    def _frames_for_prompts(self) -> Self:
        if self.num_frames not in (None, 1) and not self.version.draws_clips:
            raise ValueError(
                f"num_frames: model_version {self.model_version} draws pictures: write 1, or name a network of clips"
            )
        if self.motion is not None and not self.version.draws_clips:
            raise ValueError("motion: a network of pictures is told none; remove it")
        if len(self.first_frames) not in (0, 1, len(self.all_prompts)):
            raise ValueError(
                f"first_frames: {len(self.first_frames)} pictures for {len(self.all_prompts)} prompts: name one for "
                "all, or one for each"
            )
        for path in self.first_frames:
            if problem := why_no_file(path):
                raise ValueError(f"first_frames: {path} {problem}")
        return self

    @property
    def default_clip(self) -> tuple[int, int, int]:
        if not self.version.draws_clips:
            return 1, *self.trained_px
        return self.of_run.get("num_frames") or self.version.frames, *self.trained_px

    @property
    def default_fps(self) -> float:
        return self.of_run.get("frame_rate") or DEFAULT_FPS

    @property
    def told_motion(self) -> float | None:
        return super().told_motion if self.motion is None else self.motion


class NovaTextToVideo:
    """Draws clips with NOVA; see `families.common.text_to_video.TextToVideo`."""

    Config = NovaTextToVideoConfig
    heads = 1  # its groups of tokens are drawn one after another: there is nothing to share

    def __init__(self, config: NovaTextToVideoConfig):
        self.config, self.titles, self.networks = config, config.all_prompts, NovaNetworks(config)
        self.total_frames = config.clip_frames
        config.check_size(config.size_px)
        with only_shapes():
            autoencoder(config).latent_frames(self.total_frames)
        self.plan = Plan(
            (self.total_frames, *config.size_px),
            config.drawing,
            config.negative_prompt,
            config.told_motion,
            config.fps,
        )
        self.first = [(read_picture(path, config.size_px) * 255).round().byte() for path in config.first_frames]

    def draw(
        self, prompts: Sequence[int], seeds: Sequence[int], finished: Finished, group: ProcessGroup | None = None
    ) -> None:
        """A clip for each of some prompts, by their numbers, and its seed; see `TextToVideo`."""
        first = [self.first[number % len(self.first)] for number in prompts] if self.first else None
        self.networks.draw(
            [self.titles[number] for number in prompts], seeds, self.plan,
            lambda number, clip: finished(number, to_pictures(clip)), first,
        )  # fmt: skip

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
