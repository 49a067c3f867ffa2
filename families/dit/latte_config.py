"""Configuration keys of Latte: those of DiT, on clips."""

from pydantic import PositiveInt

from families.common.class_keys import CAPTION_KEYS
from families.dit.config import ClassConfig, DitSettings
from warpcore.clip_keys import ClipKeys

DEFAULT_FPS = 8.0
"""Frames per second at which clips are shown that were not trained at a `frame_rate`; the published program writes
such."""


class LatteSettings(DitSettings):
    """Which Latte, and of which classes.

    `generator_checkpoint_path` takes the published file (`Latte-XL-2-256x256-ucf101.pt`), a file that a run exported,
    or a run's folder.
    """

    autoencoder_frames: PositiveInt = 16
    """Frames that the autoencoder encodes or decodes at a time, of all clips of a batch: fewer need less memory."""


class LatteConfig(LatteSettings, ClipKeys, ClassConfig):
    """Keys of `train/train_latte.py`."""

    unused = CAPTION_KEYS | {"masked_loss"}

    @property
    def clip_frames(self) -> int:
        return max(frames for frames, _, _ in self.buckets(1).sizes)
