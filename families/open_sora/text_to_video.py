"""Videos for prompts by Open-Sora: out of a run, or published files."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator
from torch.distributed import ProcessGroup

from families.common.caption_cleaning import clean_caption
from families.common.drawn_pictures import GUIDED
from families.common.text_to_video import Finished, TextToVideoConfig
from families.common.transformer_lora import open_loras
from families.common.weight_files import RUN_CONFIG
from families.open_sora import build
from families.open_sora.autoencoder import ClipAutoencoder, autoencoder, latents_of
from families.open_sora.config import MISSPELT, as_published
from families.open_sora.inference import OpenSoraInferenceSettings
from families.open_sora.long_videos import Plan, Video, VideoNetworks, check_clip_frames, condition_of, total_frames
from families.open_sora.prompts import ClipPrompt, append_scores, parse_prompt
from families.open_sora.references import check_placements, read_reference
from warpcore.config import Share
from warpcore.config_files import read_mapping
from warpcore.config_keys import MicroBatchSize, Steps
from warpcore.data.clip_buckets import ClipBuckets, rungs_of
from warpcore.errors import UserError
from warpcore.idle_keys import Need
from warpcore.keys import Place
from warpcore.meta import only_shapes
from warpcore.text import shortened

SAMPLERS = ("euler", "ddim", "ddpm", "euler_ancestral", "lcm", "iddpm", "dpm-solver")
"""Those that look at one step alone, so that given frames join the others at any step; and one for none of these."""
LONG = Need("loop above 1", lambda config: config.loop > 1)


class OpenSoraTextToVideoConfig(OpenSoraInferenceSettings, TextToVideoConfig):
    """Keys of `inference/text_to_video.py` for Open-Sora."""

    needs = {"condition_frame_length": LONG, "condition_frame_edit": LONG, "guidance_channels": GUIDED}

    batch_size: MicroBatchSize = 1
    """Videos that go through the network at once."""
    steps: Steps = 30
    """Sampling steps; by default 100 of `iddpm`, 20 of `dpm-solver`."""
    guidance_channels: PositiveInt | None = None
    """Guide the first of this number of channels only; by default as published: three of four with `iddpm`, else
    all."""
    guidance: NonNegativeFloat | None = 7.0
    """Classifier-free guidance: 1 follows the prompt as trained and computes none, more follows it harder."""
    sampler: Literal[(*SAMPLERS, *MISSPELT)] = "euler"
    """Of 1.2 `euler` is the published one, and the same as `ddim` here. Of 1.0 and 1.1 it is `iddpm`, which is their
    default; `dpm-solver` (also `dmp-solver`) needs the fewest steps, and takes no given frames. The others draw
    further noise."""
    shift: PositiveFloat = 1.0
    """Moves times towards more noise (> 1), beside what `use_timestep_transform` does."""
    lora: list[Place] = []
    """LoRAs, as WEIGHTS or WEIGHTS:STRENGTH (1 by default): files, a LoRA's run, or names of the Hugging Face hub."""
    loop: Annotated[int, Field(gt=0, le=1000)] = 1
    """Clips of a long video, each of `num_frames`, that goes on from the last frames of the one before. Prompts may
    change along it: `|0|a jeep on a beach|4|the jeep in a forest`, with numbers of loops from 0."""
    condition_frame_length: PositiveInt | None = None
    """Latent frames that a clip takes over of the one before: with the autoencoder of Open-Sora multiples of 5, which
    are 17 frames (default 5), else 2."""
    condition_frame_edit: Share = 0.0
    """The share of noise from which these frames are drawn again; 0 keeps them."""
    reference_path: str = ""
    """Pictures and videos whose frames are given, separated by `;`: paths, or addresses that begin with http:// or
    https://. For prompts that name none in JSON at their end: `waves{"reference_path": "wave.png", "mask_strategy":
    "0"}`."""
    mask_strategy: str = ""
    """Which of their frames go where, as `loop, reference, first latent frame of the reference, first of the clip,
    number, edit`; further ones after a `;`. `0` begins with a picture, `0,0,-5,0,5` goes on from a video,
    `0,0,0,-5,5` leads to it, `0;0,1,0,-1,1` connects two pictures, `0,0,0,0,999,0.4` changes a video."""
    reference_mb: PositiveFloat = 500.0
    """The most MB of a reference's file."""
    reference_seconds: PositiveFloat = 60.0
    """The longest time that fetching a reference from an address may take."""
    aes: NonNegativeFloat | None = None
    """An aesthetic score that prompts are told, as captions of the published training are: 6.5 there."""
    flow: NonNegativeFloat | None = None
    """A motion score that prompts are told."""
    camera_motion: str | None = None
    """How the camera moves, as prompts are told: `pan left`, `none`, ..."""
    clean_prompts: bool = True
    """Clean prompts before T5 reads them, as the published program does: lower case, without links, markup and file
    names."""

    @field_validator("sampler", mode="before")
    @classmethod
    def _spelling(cls, value: Any) -> Any:
        return MISSPELT.get(value, value) if isinstance(value, str) else value

    @field_validator("mask_strategy", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of the denoiser: give run or generator_checkpoint_path")
        self.check_sampler("sampler", self.sampler)
        if self.sampler == "dpm-solver" and (self.loop > 1 or self.reference_path):
            raise ValueError("sampler: dpm-solver takes no given frames, as loop and reference_path have: write iddpm")
        if (self.guidance_channels or 0) > (channels := self.version.network["in_channels"]):
            raise ValueError(f"guidance_channels: {self.guidance_channels} of {channels} channels: write fewer")
        return self

    @classmethod
    def with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        return as_published(values, {"sampler": "sampler", "steps": "steps"})

    @property
    def of_run(self) -> Mapping[str, Any]:
        """What the last run says of its clips."""
        return read_mapping(self.run[-1] / RUN_CONFIG) if self.run else {}

    @property
    def default_clip(self) -> tuple[int, int, int]:
        saved = self.of_run
        if buckets := saved.get("bucket_config"):
            factor = latents_of(self)[1]
            return ClipBuckets(rungs_of(buckets, factor, saved.get("multi_aspect_ratio") or ())).largest
        if frames := saved.get("num_frames"):
            side = saved["image_size"]
            return (frames, side, side) if isinstance(side, int) else (frames, side[1], side[0])  # saved as [W, H]
        return self.version.clip

    @property
    def default_fps(self) -> float:
        return self.of_run.get("frame_rate") or self.version.fps


class OpenSoraTextToVideo:
    """Draws with the networks of Open-Sora; see `families.common.text_to_video.TextToVideo`."""

    Config = OpenSoraTextToVideoConfig

    def __init__(self, config: OpenSoraTextToVideoConfig):
        self.config = config
        self.prompts = [parse_prompt(line, config.reference_path, config.mask_strategy) for line in config.all_prompts]
        self.titles = [prompt.title for prompt in self.prompts]
        with only_shapes():
            shapes = autoencoder(config)
        frames, (height, width) = config.clip_frames, config.size_px
        check_clip_frames(shapes, frames)
        if min(height, width) < shapes.compression:
            raise UserError(f"image_size: {height} x {width} px; sides have at least {shapes.compression} px")
        self.plan = Plan(
            (frames, height, width), config.told_fps, config.loop,
            condition_of(shapes, frames, config.condition_frame_length) if config.loop > 1 else 0,
            config.condition_frame_edit, self._read_as(config.negative_prompt), config.shift,
            {"steps": config.steps, "sampler": config.sampler,
             "guidance": None if config.guidance == 1 else config.guidance,
             "guidance_channels": config.guidance_channels or config.guided_channels(config.sampler)},
        )  # fmt: skip
        self.total_frames = total_frames(shapes, self.plan)
        size = tuple(side // shapes.compression * shapes.compression for side in (height, width))
        self.references = self._references(size)
        for prompt in self.prompts:
            try:
                self._check(prompt, shapes)
            except UserError as error:
                raise UserError(f"prompt {shortened(prompt.title, 80)!r}: {error}") from None
        self.networks = VideoNetworks(config, open_loras(build.network, config.lora, config, config.use_ema))

    def _check(self, prompt: ClipPrompt, shapes: ClipAutoencoder) -> None:
        """Raise UserError for texts of loops, or frames of references, that there are not."""
        config = self.config
        late = [loop for loop, _ in prompt.texts if loop >= config.loop]
        if late:
            raise UserError(f"loop {late[0]} of {config.loop}; give loop={late[-1] + 1}")
        if prompt.placements and config.sampler == "dpm-solver":
            raise UserError("sampler: dpm-solver takes no given frames: write iddpm")
        lengths = [shapes.latent_frames(len(self.references[place])) for place in prompt.references]
        frames = shapes.latent_frames(config.clip_frames)
        check_placements(prompt.placements, lengths, frames, config.loop, shapes.align or 1)

    def _references(self, size: tuple[int, int]) -> dict[str, Any]:
        """The frames of all references, by what names them."""
        places = dict.fromkeys(place for prompt in self.prompts for place in prompt.references)
        limits = int(self.config.reference_mb * 1e6), self.config.reference_seconds
        return {place: read_reference(place, size, *limits) for place in places}

    def _read_as(self, text: str) -> str:
        return clean_caption(text) if self.config.clean_prompts else text

    def _told(self, prompt: ClipPrompt) -> ClipPrompt:
        """The prompt with its texts as T5 reads them."""
        config = self.config
        scores = {"aes": config.aes, "flow": config.flow, "camera_motion": config.camera_motion}
        return prompt.mapped(lambda text: self._read_as(append_scores(text, **scores)))

    @property
    def heads(self) -> int:
        """Of the attention within frames."""
        with only_shapes():
            return build.network(self.config).blocks[0].attn.num_heads

    def draw(
        self, prompts: Sequence[int], seeds: Sequence[int], finished: Finished, group: ProcessGroup | None = None
    ) -> None:
        """A video for each of some prompts, by their numbers, and its seed; see `TextToVideo`."""
        told = [self._told(prompt) for prompt in self.prompts]
        references = [[self.references[place] for place in prompt.references] for prompt in self.prompts]
        videos = [Video(told[number], references[number], seed)
                  for number, seed in zip(prompts, seeds, strict=True)]  # fmt: skip
        self.networks.draw_videos(videos, self.plan, finished, group)

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
