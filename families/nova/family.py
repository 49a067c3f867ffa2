"""What the registry knows of NOVA."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from families.common.converted import ConvertedConfig
from families.common.family import CLASS_TO_IMAGE, SCORING, TEXT_TO_IMAGE, TEXT_TO_VIDEO, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.nova.files import is_of_nova

if TYPE_CHECKING:
    from families.common.imported import ImportedRecord

OF_NETWORK = ("image_base_size", "video_base_size")
"""Numbers that the config of its transformer has."""


class Nova(Family):
    name = "nova"
    title = "NOVA"
    tasks = {
        TEXT_TO_IMAGE: "families.nova.text_to_image.NovaTextToImage",
        CLASS_TO_IMAGE: "families.nova.class_to_image.NovaClassToImage",
        TEXT_TO_VIDEO: "families.nova.text_to_video.NovaTextToVideo",
        SCORING: "families.nova.scoring.ScoredNova",
    }
    formats = (
        ExportFormat.of("families.nova.exports", "published", "a run, its file, a published folder", "a folder with "
                        "`transformer` and `scheduler`, in the published names", "to_published", keys="ExportSettings",
                        writes_folder=True),
    )  # fmt: skip

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return "loss_repeat" in config or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_nova(header.names)

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return str(index.get("_class_name", "")).startswith("NOVA") or all(name in index for name in OF_NETWORK)

    def imported_records(self, folder: Path) -> "Iterator[ImportedRecord]":
        return import_module("families.nova.imports").imported_records(folder)

    def converted_config(self, config: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> ConvertedConfig | None:
        of_theirs = import_module("families.nova.published_config")
        return of_theirs.convert(config, deepspeed) if of_theirs.is_published(config) else None


FAMILY = Nova()
