"""Stable Diffusion (arXiv:2112.10752) for the registry: its runs, files and folders, and what it can do."""

import re
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from families.common.family import RECONSTRUCTION, SCORING, TEXT_TO_IMAGE, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.stable_diffusion.components import PIPELINES, T5_PART, library_component
from families.stable_diffusion.single_file import is_single_file

LORA_NAMES = re.compile(
    r"lora_te[12]?_|(lora_)?text_encoder(_2)?\.|"
    r"(lora_unet_|lycoris_|diffusion_model\.|(base_model\.model\.)?(unet\.)?)((down|up)_blocks[._]\d+[._]"
    r"(resnets|attentions|(down|up)samplers)|mid_block[._]|(input|output)_blocks[._]\d+[._]\d[._]|middle_block[._])"
)
"""What names of tensors in LoRA files begin with."""
NETWORKS = ("UNet2DConditionModel", "AutoencoderKL")


_format = partial(ExportFormat.of, "families.stable_diffusion.exports")
_lora = partial(_format, keys="LoraExportSettings")


class StableDiffusion(Family):
    name = "stable_diffusion"
    title = "Stable Diffusion"
    weight_keys = {
        "generator": "generator_checkpoint_path", "autoencoder": "autoencoder_checkpoint_path", "lora": "lora",
    }  # fmt: skip

    formats = (
        _format("single-file", "a run, a single file, a pipeline's folder",
                "a checkpoint in one file, for A1111, Forge and ComfyUI", "to_single_file",
                keys="ExportSettings"),
        _format("diffusers", "the same", "a folder for StableDiffusion(XL)Pipeline, or of one with T5",
                "to_diffusers", keys="ExportSettings", writes_folder=True),
        _lora("lora", "a LoRA: a run, a file, peft's folder", "our file, which holds its tokens", "export_lora",
              "warpcore"),
        _lora("lora-kohya", "the same", "a file for kohya's scripts, A1111, Forge and "
              "ComfyUI", "export_lora", "kohya"),
        _lora("lora-diffusers", "the same", "a file for diffusers' load_lora_weights", "export_lora", "diffusers"),
    )  # fmt: skip
    format_notes = """\
Of the first two, export_dtype chooses the precision, only_unet leaves out autoencoder and text encoders, and lora adds
LoRAs to the weights: a LoRA's run is written with its LoRA in them. What stands beside the U-Net of a run is that of
the run's config. A LoRA's file that does not say it needs its model_version."""
    tasks = {
        TEXT_TO_IMAGE: "families.stable_diffusion.text_to_image.StableDiffusionTextToImage",
        RECONSTRUCTION: "families.stable_diffusion.reconstruction.AutoencoderReconstruction",
        SCORING: "families.stable_diffusion.scoring.ScoredStableDiffusion",
    }

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return config.get("model_version") in ("sd15", "sdxl") or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        ours = header.metadata.get(FAMILY_KEY) == self.name
        whole = is_single_file(header.names) or library_component(header.names) in ("unet", "vae")
        return ours or whole or any(map(LORA_NAMES.match, header.names))

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        kind = str(index.get("_class_name"))
        return kind in NETWORKS or PIPELINES.fullmatch(kind) is not None or T5_PART in index

    def imported_features(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        return import_module("families.stable_diffusion.caches").features_of(tensors)


FAMILY = StableDiffusion()
