"""What the registry knows of NOVA."""

from collections.abc import Mapping
from typing import Any

from families.common.family import Family
from families.common.weight_files import FAMILY_KEY, Header
from families.nova.files import is_of_nova


class Nova(Family):
    name = "nova"
    title = "NOVA"

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        return "loss_repeat" in config or super().has_run(config, weights)

    def has_weights(self, header: Header) -> bool:
        return header.metadata.get(FAMILY_KEY) == self.name or is_of_nova(header.names)


FAMILY = Nova()
