"""What training scripts share that learn from clips: which frames and buckets the features of a cache are of."""

from typing import Any

from families.common.features import PICTURE_SETTINGS
from families.common.training import DiffusionTraining

BUCKET_CONFIG = "bucket_config"
CLIP_SETTINGS = (*PICTURE_SETTINGS, "frame_stride", "frame_rate", BUCKET_CONFIG)
"""Settings that what is made of a clip depends on. The first frame is drawn by the sample's seed, as crops are: of V
variants that a cache stores of a sample, each has its own."""


class ClipTraining(DiffusionTraining):
    """Trains a denoiser of the latents of clips. Its config has `warpcore.clip_keys.ClipKeys`."""

    takes_videos = True

    def feature_setting(self, name: str) -> Any:
        if name != BUCKET_CONFIG:
            return super().feature_setting(name)
        # Not the sizes of micro-batches, which change no feature.
        return {size: {num_frames: share for num_frames, (share, _) in lengths.items()}
                for size, lengths in self.config.bucket_config.items()}  # fmt: skip
