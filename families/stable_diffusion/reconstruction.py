"""Pictures through an autoencoder of Stable Diffusion and back, for `inference/reconstruct.py`."""

from pathlib import Path
from typing import Any

from families.common import reconstruction
from families.common.autoencoders import Autoencoder
from families.common.inference import read_run
from families.common.weight_files import AUTOENCODER
from families.common.weight_source import with_local_weights
from families.stable_diffusion.build import autoencoder_by_itself, autoencoder_source
from families.stable_diffusion.config import SdSettings


class AutoencoderReconstructConfig(reconstruction.AutoencoderReconstructConfig):
    """Keys of `inference/reconstruct.py` for an autoencoder of Stable Diffusion."""

    @classmethod
    def autoencoder_of_run(cls, folder: Path, use_ema: bool) -> Path:
        saved, exported = read_run(folder, ("autoencoder", "generator", "lora"), use_ema)
        found = exported.get("autoencoder") or saved.get(AUTOENCODER)
        if found is None:  # beside the U-Net that it began with, or the one that comes with the project
            settings = SdSettings(**{key: saved[key] for key in SdSettings.model_fields if saved.get(key) is not None})
            found = autoencoder_source(with_local_weights(settings)).path
        return Path(found)


class AutoencoderReconstruction(reconstruction.AutoencoderReconstruction):
    """Rebuilds with an autoencoder of Stable Diffusion."""

    Config = AutoencoderReconstructConfig

    def load(self, path: Path, **options: Any) -> Autoencoder:
        return autoencoder_by_itself(path, any_scale=True, **options)
