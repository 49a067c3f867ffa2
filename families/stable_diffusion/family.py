"""Stable Diffusion (arXiv:2112.10752) for the registry: its runs, files and folders, and what it can do."""

from collections.abc import Mapping
from typing import Any

from families.common.family import RECONSTRUCTION, TEXT_TO_IMAGE, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.stable_diffusion.components import PIPELINES, library_component
from families.stable_diffusion.single_file import is_single_file

NETWORKS = ("UNet2DConditionModel", "AutoencoderKL")


class StableDiffusion(Family):
    name = "stable_diffusion"
    title = "Stable Diffusion"
    weight_keys = {"generator": "generator_checkpoint_path", "autoencoder": "autoencoder_checkpoint_path"}

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return config.get("model_version") in ("sd15", "sdxl") or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        ours = header.metadata.get(FAMILY_KEY) == self.name
        return ours or is_single_file(header.names) or library_component(header.names) in ("unet", "vae")

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        kind = str(index.get("_class_name"))
        return kind in NETWORKS or PIPELINES.fullmatch(kind) is not None

    def task(self, name: str) -> type | None:
        if name == RECONSTRUCTION:
            from families.stable_diffusion.reconstruction import AutoencoderReconstruction

            return AutoencoderReconstruction
        if name == TEXT_TO_IMAGE:
            from families.stable_diffusion.text_to_image import StableDiffusionTextToImage

            return StableDiffusionTextToImage
        return None


FAMILY = StableDiffusion()
