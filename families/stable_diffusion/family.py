"""Stable Diffusion (arXiv:2112.10752) for the registry: its runs, files and folders, and what it can do."""

from collections.abc import Mapping
from typing import Any

from families.common.family import RECONSTRUCTION, Family
from families.common.weight_files import FAMILY_KEY, Header

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
AUTOENCODER, AUTOENCODER_TENSORS = (
    "AutoencoderKL",
    {"encoder.conv_in.weight", "decoder.mid_block.resnets.0.conv1.weight"},
)


class StableDiffusion(Family):
    name = "stable_diffusion"
    title = "Stable Diffusion"
    weight_keys = {"generator": "generator_checkpoint_path", "autoencoder": "autoencoder_checkpoint_path"}

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or header.names >= AUTOENCODER_TENSORS

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return index.get("_class_name") in (*PIPELINES, AUTOENCODER)

    def task(self, name: str) -> type | None:
        if name == RECONSTRUCTION:
            from families.stable_diffusion.reconstruction import AutoencoderReconstruction

            return AutoencoderReconstruction
        return None


FAMILY = StableDiffusion()
