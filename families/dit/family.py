"""DiT (arXiv:2212.09748), Latte (2401.03048) and the networks beside them on the same latents, for the registry.

Each network of this folder is a family of its own in messages: it has its files, tasks and exports. Another one joins
with a class here and a place in `FAMILIES`, and with files of its own that use `config.LatentSettings`,
`autoencoder.py`, `training.LatentTraining` and `build.process`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from families.common.family import CLASS_TO_IMAGE, RECONSTRUCTION, SCORING, TEXT_TO_IMAGE, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.dit.files import is_of_dit, is_of_latte
from families.dit.pixart_files import TRANSFORMER, is_of_pixart

_format = partial(ExportFormat.of, "families.dit.exports")
NUM_FRAMES = "num_frames"
"""A key that runs on clips alone have."""


class Dit(Family):
    name = "dit"
    title = "DiT"
    tasks = {
        CLASS_TO_IMAGE: "families.dit.class_to_image.DitClassToImage",
        RECONSTRUCTION: "families.dit.reconstruction.DitReconstruction",
        SCORING: "families.dit.scoring.ScoredDit",
    }
    formats = (
        _format("published", "a run, or a published file", "a `.pt` file of the published names", "to_published",
                keys="ExportSettings", endings=(".pt",)),
    )  # fmt: skip

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return ("class_getter" in config and NUM_FRAMES not in config) or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        named = header.metadata.get(FAMILY_KEY)
        return named == self.name or (named is None and is_of_dit(header.names) and not is_of_latte(header.shapes))


class Latte(Family):
    name = "latte"
    title = "Latte"
    tasks = {
        CLASS_TO_IMAGE: "families.dit.latte_class_to_image.LatteClassToImage",
        RECONSTRUCTION: "families.dit.reconstruction.DitReconstruction",
        SCORING: "families.dit.latte_scoring.ScoredLatte",
    }
    formats = (
        _format("published", "a run, or the published file", "a `.pt` file of the published names, under `ema`",
                "latte_to_published", keys="LatteExportSettings", endings=(".pt",)),
    )  # fmt: skip

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return {"class_getter", "autoencoder_frames"} <= config.keys() or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_latte(header.shapes)


_pixart_format = partial(ExportFormat.of, "families.dit.pixart_exports")
_lora = partial(_pixart_format, keys="LoraExportSettings")
PIXART_VERSIONS = ("XL/2-256", "XL/2-512", "XL/2-1024-MS")
"""Values of `model_version` that no other network has."""


class Pixart(Family):
    name = "pixart"
    title = "PixArt-alpha"
    weight_keys = {"generator": "generator_checkpoint_path", "lora": "lora"}
    tasks = {
        TEXT_TO_IMAGE: "families.dit.pixart_text_to_image.PixartTextToImage",
        RECONSTRUCTION: "families.dit.reconstruction.PixartReconstruction",
        SCORING: "families.dit.pixart_scoring.ScoredPixart",
    }
    formats = (
        _pixart_format("published", "a run, a published file", "a `.pth` file of the published names", "to_published",
                       keys="ExportSettings", endings=(".pth",)),
        _pixart_format("diffusers", "a run, a published file, a folder of diffusers",
                       "a folder for PixArtTransformer2DModel", "to_diffusers", keys="ExportSettings",
                       writes_folder=True),
        _lora("lora", "a LoRA: a run, a file, peft's folder", "our file", "export_lora", "warpcore"),
        _lora("lora-diffusers", "the same", "a file in peft's names, as diffusers has them", "export_lora",
              "diffusers"),
        _lora("lora-kohya", "the same", "a file in kohya's names", "export_lora", "kohya"),
    )  # fmt: skip
    format_notes = """\
Of the first two, export_dtype chooses the precision, and lora adds LoRAs to the weights."""

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return str(config.get("model_version")) in PIXART_VERSIONS or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_pixart(header.names)

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return str(index.get("_class_name")) in (TRANSFORMER, "PixArtAlphaPipeline")


FAMILIES = (Dit(), Latte(), Pixart())
