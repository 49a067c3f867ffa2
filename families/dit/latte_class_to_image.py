"""Clips of classes by a Latte: out of a run, or the published file."""

from families.dit.class_to_image import DitClassToImage, DitClassToImageConfig
from families.dit.drawing import LatteNetworks
from families.dit.inference import LatteInferenceSettings
from warpcore.config_keys import MicroBatchSize


class LatteClassToImageConfig(LatteInferenceSettings, DitClassToImageConfig):
    """Keys of `inference/class_to_image.py` for Latte."""

    batch_size: MicroBatchSize = 1
    """Clips that go through a network at once."""

    @property
    def clip_fps(self) -> float | None:
        return self.fps if self.clip_frames > 1 else None

    @property
    def drawn_size(self) -> tuple[int, int, int]:
        return self.clip_frames, *self.size_px


class LatteClassToImage(DitClassToImage):
    """Draws with a Latte and its autoencoder; see `families.common.class_to_image.ClassToImage`."""

    Config = LatteClassToImageConfig
    networks_of = LatteNetworks
