"""DiT (arXiv:2212.09748) and the networks beside it on the same latents, for the registry.

Each network of this folder is a family of its own in messages: it has its files, tasks and exports. Another one joins
with a class here and a place in `FAMILIES`, and with files of its own that use `config.LatentSettings`,
`autoencoder.py`, `training.LatentTraining` and `build.process`.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from families.common.family import CLASS_TO_IMAGE, SCORING, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, Header
from families.dit.files import is_of_dit

_format = partial(ExportFormat.of, "families.dit.exports")


class Dit(Family):
    name = "dit"
    title = "DiT"
    tasks = {
        CLASS_TO_IMAGE: "families.dit.class_to_image.DitClassToImage",
        SCORING: "families.dit.scoring.ScoredDit",
    }
    formats = (
        _format("published", "a run, or a published file", "a `.pt` file of the published names", "to_published",
                keys="ExportSettings", endings=(".pt",)),
    )  # fmt: skip

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return "class_getter" in config or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_dit(header.names)


FAMILIES = (Dit(),)
