"""Stable Cascade (Wuerstchen, arXiv:2306.00637) for the registry: its runs, files and folders, and what it can do."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from families.cascade.files import WEIGHT_KEYS, is_of_cascade
from families.cascade.versions import VERSIONS
from families.common.family import RECONSTRUCTION, SCORING, TEXT_TO_IMAGE, ExportFormat, Family
from families.common.weight_files import Header

PIPELINES = ("StableCascade", "Wuerstchen")


_format = partial(ExportFormat.of, "families.cascade.exports")
_lora = partial(_format, keys="LoraExportSettings")


class Cascade(Family):
    name = "cascade"
    title = "Stable Cascade"
    weight_keys = WEIGHT_KEYS
    formats = (
        _format("diffusers", "a run, or weights of Stage C", "a folder for StableCascadePriorPipeline, and one for "
                "StableCascadeDecoderPipeline", "to_diffusers", keys="ExportSettings", writes_folder=True),
        _format("from-diffusers", "such a folder", "a folder of our files, with the same weights", "from_diffusers",
                writes_folder=True),
        _lora("lora", "a LoRA: a run, a file, peft's folder", "our file, which says rank, alpha and tokens",
              "export_lora", "warpcore"),
        _lora("lora-comfyui", "the same", "a file for ComfyUI; tokens as embeddings beside it", "export_lora",
              "comfyui"),
        _lora("lora-kohya", "the same", "a file for kohya's scripts; tokens the same way", "export_lora", "kohya"),
        _lora("lora-onetrainer", "the same", "a file for OneTrainer, with the tokens", "export_lora", "onetrainer"),
        _lora("lora-peft", "the same", "a folder for peft, on diffusers' StableCascadeUNet", "export_lora", "peft",
              writes_folder=True),
        _lora("lora-reference", "the same", "a numbered file of the reference implementation", "export_lora",
              "reference"),
        _lora("lora-merged", "the same", "weights of Stage C that hold it; tokens as embeddings", "merge_lora"),
        _format("controlnet", "a ControlNet: a run or a file", "our file, which says filter and blocks",
                "export_controlnet", False, keys="ControlNetExportSettings"),
        _format("controlnet-reference", "the same", "a file that the reference implementation loads",
                "export_controlnet", True, keys="ControlNetExportSettings"),
    )  # fmt: skip
    format_notes = """\
Tensors keep every bit, but in lora-merged, and in lora-reference where alpha is no power of two. Tokens beside
TARGET.safetensors are in TARGET_embeddings, a file each.

With further keys, diffusers takes other networks, every LoRA its model_version, and files that do not say it what they
need: lora the module_filters and train_tokens of the training, controlnet the controlnet_filter and controlnet_blocks.
diffusers has no previewer and no encoder, and for the mini cascade it wants sides that 32 divides."""
    tasks = {
        TEXT_TO_IMAGE: "families.cascade.text_to_image.CascadeTextToImage",
        RECONSTRUCTION: "families.cascade.reconstruction.CascadeReconstruction",
        SCORING: "families.cascade.scoring.ScoredCascade",
    }

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return config.get("model_version") in VERSIONS or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return is_of_cascade(header)

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return str(index.get("_class_name", "")).startswith(PIPELINES)


FAMILY = Cascade()
