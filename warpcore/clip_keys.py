"""The keys of scripts that train on clips: which frames, and which buckets with which micro-batch sizes.

A family's config takes them in: `class MyConfig(ClipKeys, DiffusionConfig)`.
"""

from typing import Annotated, Self

from pydantic import Field, PlainSerializer, PlainValidator, PositiveFloat, model_validator

from warpcore.config_keys import BatchSize, Settings
from warpcore.data.buckets import Buckets
from warpcore.data.clip_buckets import MAX_FRAMES, ClipBuckets, Rung, checked, rungs_of
from warpcore.idle_keys import Need

FrameCount = Annotated[int, Field(gt=0, le=MAX_FRAMES)]
BucketConfig = Annotated[dict[str, dict[int, list]], PlainValidator(checked), PlainSerializer(dict)]


class ClipKeys(Settings):
    """Clips."""

    needs = dict.fromkeys(
        ("frame_stride", "frame_rate"), Need("clips of several frames", lambda config: config.num_frames != 1)
    )

    num_frames: FrameCount | None = None
    """Frames of every clip; 1 trains on pictures. Shorter videos are left out, and counted. Sizes are those of
    `image_size` and `multi_aspect_ratio`."""
    bucket_config: BucketConfig = {}
    """In place of `num_frames`: resolutions (`144p`, `240p`, `360p`, `480p`, `720p`, `1080p`, `256`, `512`, `1024`, or
    the side of a square as `64px`), of each the numbers of frames, and of each of these [share of its clips to keep,
    micro-batch size]: `{480p: {51: [0.5, 2]}, 240p: {1: [1.0, 64], 51: [1.0, 8], 102: [[1.0, 0.33], 4]}}`. A clip goes
    to the largest bucket that it fills and that keeps it; with [keep, take] a length is considered at all with the
    probability `take`. `1` is for pictures."""
    micro_batches_per_update: BatchSize | None = None
    """With `bucket_config`, in place of `batch_size`: micro-batches of an update, over all processes, whose number has
    to divide it. The loss is the mean over all samples of the update."""
    batch_size: BatchSize | None = None
    """Samples per update, over all processes and accumulation steps, with `num_frames`."""
    frame_stride: FrameCount = 1
    """One in this number of frames of a video is taken."""
    frame_rate: PositiveFloat | None = None
    """Frames per second of the clips, in place of `frame_stride`; slower videos keep their own."""

    @model_validator(mode="after")
    def _one_way_to_choose_clips(self) -> Self:
        if self.frame_rate is not None and self.frame_stride != 1:
            raise ValueError("frame_stride and frame_rate exclude each other: remove one")
        if not self.bucket_config:
            self._check_one_length()
            return self
        others = ("num_frames", "batch_size", "micro_batch_size", "grad_accum_steps", "image_size",
                  "bucketeer_random_ratio")  # fmt: skip
        fields = type(self).model_fields
        if given := [key for key in others if getattr(self, key) != fields[key].default]:
            raise ValueError(f"{', '.join(given)}: bucket_config says this for each bucket: remove one of the two")
        if self.micro_batches_per_update is None:
            raise ValueError("bucket_config needs micro_batches_per_update: write how many make an update")
        keeping = [keep for lengths in self.bucket_config.values() for keep, _ in lengths.values()]
        if not any(keep[0] if isinstance(keep, list) else keep for keep in keeping):
            raise ValueError("bucket_config: no bucket keeps a sample: write a share above 0 into one")
        return self

    def _check_one_length(self) -> None:
        if self.num_frames is None:
            raise ValueError("num_frames or bucket_config is required: write one, such as num_frames: 17")
        if self.batch_size is None:
            raise ValueError(
                "batch_size: this key is required, with num_frames. It says how many clips make an update"
            )
        if self.micro_batches_per_update is not None:
            raise ValueError("micro_batches_per_update goes with bucket_config: write batch_size, or bucket_config")

    @property
    def own_micro_batches(self) -> int | None:
        return self.micro_batches_per_update

    def buckets(self, factor: int) -> ClipBuckets:
        """Sizes (frames, H, W), sides being multiples of `factor` px."""
        if self.bucket_config:
            rungs = rungs_of(self.bucket_config, factor, self.multi_aspect_ratio or ())
        else:
            shapes = Buckets.for_image_size(
                self.image_size, self.multi_aspect_ratio or (), factor, self.bucketeer_random_ratio
            )
            sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
            rungs = [Rung("x".join(map(str, sides)) + "px", self.num_frames, shapes)]
        return ClipBuckets(rungs, self.frame_stride, self.frame_rate)
