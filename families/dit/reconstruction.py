"""Pictures and clips through the autoencoder of DiT, Latte and PixArt, for `inference/reconstruct.py`."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from families.common import reconstruction
from families.common.autoencoders import Autoencoder
from families.common.inference import read_run
from families.common.library_files import component_folder, read_config, read_tensors
from families.common.weight_files import AUTOENCODER
from families.dit.autoencoder import PUBLISHED, autoencoder_source
from families.dit.config import DitSettings, LatentSettings
from families.dit.pixart_config import PixartSettings


class DitReconstructConfig(reconstruction.AutoencoderReconstructConfig):
    """Keys of `inference/reconstruct.py` for the autoencoder whose latents DiT and Latte draw."""

    settings_of_run: ClassVar[type[LatentSettings]] = DitSettings

    @classmethod
    def autoencoder_of_run(cls, folder: Path, use_ema: bool) -> Path:
        kind = cls.settings_of_run
        saved, _ = read_run(folder, ("generator", "lora"), use_ema)
        return autoencoder_source(kind(**{key: saved[key] for key in kind.model_fields if saved.get(key) is not None}))


class PixartReconstructConfig(DitReconstructConfig):
    """Keys of `inference/reconstruct.py` for the autoencoder whose latents PixArt-alpha draws."""

    settings_of_run = PixartSettings


class DitReconstruction(reconstruction.AutoencoderReconstruction):
    """Rebuilds with an autoencoder of DiT or Latte."""

    Config = DitReconstructConfig

    def load(self, path: Path, **options: Any) -> Autoencoder:
        place = component_folder(path, "vae")
        config = read_config(place, AUTOENCODER) or PUBLISHED
        return Autoencoder.of(config, partial(read_tensors, place, AUTOENCODER), place, AUTOENCODER, **options)


class PixartReconstruction(DitReconstruction):
    """Rebuilds with an autoencoder of PixArt-alpha."""

    Config = PixartReconstructConfig
