"""What the registry knows of Open-Sora 1.0, 1.1 and 1.2 (STDiT, STDiT2, STDiT3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from families.common.family import SCORING, TEXT_TO_VIDEO, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.open_sora.files import kind_of

_format = partial(ExportFormat.of, "families.open_sora.exports")


class OpenSora(Family):
    name = "open_sora"
    title = "Open-Sora"
    weight_keys = {"generator": "generator_checkpoint_path", "lora": "lora"}
    tasks = {
        TEXT_TO_VIDEO: "families.open_sora.text_to_video.OpenSoraTextToVideo",
        SCORING: "families.open_sora.scoring.ScoredOpenSora",
    }
    formats = (
        _format("published", "a run, a published file or folder", "a file of the published names", "to_published",
                keys="ExportSettings", endings=(".safetensors", ".pth")),
        _format("lora", "a LoRA: a run, a file", "our file", "export_lora", "warpcore", keys="LoraExportSettings"),
    )  # fmt: skip

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return "mask_ratios" in config or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or kind_of(header.names) is not None


FAMILY = OpenSora()
