"""Pictures through the autoencoder of Cosmos-Predict2 and back, for `inference/reconstruct.py`."""

from pathlib import Path
from typing import Any

from families.common import reconstruction
from families.common.autoencoders import Autoencoder
from families.common.inference import read_run
from families.common.weight_source import with_local_weights
from families.cosmos.build import autoencoder_by_itself, autoencoder_source
from families.cosmos.config import CosmosSettings
from families.cosmos.inference import OF_RUNS


class CosmosReconstructConfig(reconstruction.AutoencoderReconstructConfig):
    """Keys of `inference/reconstruct.py` for the autoencoder of Cosmos-Predict2 (Wan 2.1)."""

    @classmethod
    def autoencoder_of_run(cls, folder: Path, use_ema: bool) -> Path:
        saved, exported = read_run(folder, ("autoencoder", *OF_RUNS), use_ema)
        if "autoencoder" in exported:
            return exported["autoencoder"]
        known = {key: saved[key] for key in CosmosSettings.model_fields if saved.get(key) is not None}
        return autoencoder_source(with_local_weights(CosmosSettings(**known))).path


class CosmosReconstruction(reconstruction.AutoencoderReconstruction):
    """Rebuilds with the autoencoder of Cosmos-Predict2."""

    Config = CosmosReconstructConfig

    def load(self, path: Path, **options: Any) -> Autoencoder:
        return autoencoder_by_itself(path, **options)
