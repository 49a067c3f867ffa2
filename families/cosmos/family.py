"""Cosmos-Predict2 Text2Image for the registry: its runs, files and folders, and what it can do."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from families.common.family import RECONSTRUCTION, SCORING, TEXT_TO_IMAGE, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header, read_header
from families.cosmos.published_folder import published_file

NAMES = re.compile(
    r"(net(_ema)?\.)?blocks\.0\.adaln_modulation_self_attn\.1\.weight|transformer_blocks\.0\.norm1\.linear_1\.weight"
)
"""Tensors that only this network has, in published names and in those of diffusers."""
LORA_NAMES = re.compile(
    r"(net\.|diffusion_model\.|(base_model\.model\.)?)blocks\.\d+\.(self_attn|cross_attn|mlp|adaln_modulation_\w+)\.|"
    r"(transformer|(base_model\.model\.)?transformer)?\.?transformer_blocks\.\d+\.(attn[12]|ff|norm[123])\."
)
"""What names of tensors in LoRA files begin with."""
AUTOENCODER_NAMES = ("encoder.middle.0.residual.0.gamma", "encoder.mid_block.resnets.0.norm1.gamma")
"""Tensors of a Wan autoencoder, in published names and in those of diffusers."""
FOLDERS = ("CosmosTransformer3DModel", "Cosmos2TextToImagePipeline", "AutoencoderKLWan")

_format = partial(ExportFormat.of, "families.cosmos.exports")
_lora = partial(_format, keys="LoraExportSettings")


class Cosmos(Family):
    name = "cosmos"
    title = "Cosmos-Predict2"
    weight_keys = {
        "generator": "generator_checkpoint_path", "autoencoder": "autoencoder_checkpoint_path", "lora": "lora",
    }  # fmt: skip
    formats = (
        _format("published", "a run, a published file, a folder of diffusers", "a file of the published names: "
                "`.pt`, or `.safetensors` for ComfyUI", "to_published", keys="ExportSettings",
                endings=(".pt", ".safetensors")),
        _format("diffusers", "the same", "a folder for CosmosTransformer3DModel", "to_diffusers",
                keys="ExportSettings", writes_folder=True),
        _lora("lora", "a LoRA: a run, a file, peft's folder", "our file", "export_lora", "warpcore"),
        _lora("lora-diffusers", "the same", "a file for load_lora_adapter of diffusers' network", "export_lora",
              "diffusers"),
        _lora("lora-comfyui", "the same", "a file for ComfyUI", "export_lora", "comfyui"),
        _lora("lora-published", "the same", "a file of the published program's names", "export_lora", "published"),
    )  # fmt: skip
    tasks = {
        TEXT_TO_IMAGE: "families.cosmos.text_to_image.CosmosTextToImage",
        RECONSTRUCTION: "families.cosmos.reconstruction.CosmosReconstruction",
        SCORING: "families.cosmos.scoring.ScoredCosmos",
    }
    format_notes = """\
Of the first two, export_dtype chooses the precision, and lora adds LoRAs to the weights: a LoRA's run is written with
its LoRA in them."""

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return config.get("model_version") in ("0.6B", "2B", "14B") or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        ours = header.metadata.get(FAMILY_KEY) == self.name
        lora = any(".lora_" in name and LORA_NAMES.match(name) for name in header.names)
        autoencoder = not header.names.isdisjoint(AUTOENCODER_NAMES)
        return ours or lora or autoencoder or any(map(NAMES.fullmatch, header.names))

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return str(index.get("_class_name")) in FOLDERS

    def has_folder(self, folder: Path) -> bool:
        file = published_file(folder)
        return file is not None and file.is_file() and self.has_weights(read_header(file))


FAMILY = Cosmos()
