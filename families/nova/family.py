"""What the registry knows of NOVA."""

from collections.abc import Mapping
from typing import Any

from families.common.family import SCORING, TEXT_TO_IMAGE, TEXT_TO_VIDEO, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.nova.files import is_of_nova

OF_NETWORK = ("image_base_size", "video_base_size")
"""Numbers that the config of its transformer has."""


class Nova(Family):
    name = "nova"
    title = "NOVA"
    tasks = {
        TEXT_TO_IMAGE: "families.nova.text_to_image.NovaTextToImage",
        TEXT_TO_VIDEO: "families.nova.text_to_video.NovaTextToVideo",
        SCORING: "families.nova.scoring.ScoredNova",
    }

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return "loss_repeat" in config or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_nova(header.names)

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        return str(index.get("_class_name", "")).startswith("NOVA") or all(name in index for name in OF_NETWORK)


FAMILY = Nova()
