"""What inference scripts take of runs and files of Cosmos-Predict2: which networks, and what these say about them."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common import inference_sources
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import GENERATOR
from families.cosmos.components import find_beside, find_transformer
from families.cosmos.config import CosmosSettings
from families.cosmos.versions import version_of

OF_RUNS = {"generator": GENERATOR, "lora": "lora"}
"""What runs export, and the key that takes each."""


class CosmosInferenceSettings(RunSettings, CosmosSettings):
    """The networks of a whole Cosmos-Predict2, published or out of training runs."""

    use_ema: bool = True
    """Take the averaged weights of a `run`, or of a published file (`net_ema.`), where there are some."""

    @property
    def takes_average(self) -> bool:
        return self.use_ema

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from what the denoiser's file shows."""
        merged = with_runs(cls, values, settings_of_run)
        if merged.get("model_version") is None and isinstance(merged.get(GENERATOR), Path):
            config = find_transformer(merged[GENERATOR], GENERATOR).config
            merged |= {"model_version": version_of(config) or "mini"}
        return merged


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """See `families.common.inference_sources.settings_of_run`."""

    def beside(place: Path, component: str, key: str) -> Path | None:
        found = find_beside(place, component, key)
        return found and found.path

    return inference_sources.settings_of_run(folder, CosmosSettings, OF_RUNS, beside, use_ema)
