"""What inference scripts take of runs and files of DiT: which networks, and what these say about themselves."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common import inference_sources
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import GENERATOR, TARGET_KEY, target_of
from families.dit.config import DitSettings
from families.dit.files import dit_numbers
from families.dit.versions import version_of

OF_RUNS = {"generator": GENERATOR}
"""What runs export, and the key that takes it."""


class DitInferenceSettings(RunSettings, DitSettings):
    """A DiT with its autoencoder, published or out of a training run."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the run, and from what the denoiser's file shows."""
        merged = with_runs(cls, values, settings_of_run)
        if isinstance(path := merged.get(GENERATOR), Path):
            config = dit_numbers(path, GENERATOR)
            said = {key: config[key] for key in ("num_classes", "learn_sigma") if key in config}
            said |= {"model_version": version_of(config), TARGET_KEY: target_of(path)}
            known = {key: value for key, value in said.items() if value is not None}
            merged = known | {key: value for key, value in merged.items() if value is not None}
        return merged


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """See `families.common.inference_sources.settings_of_run`."""
    return inference_sources.settings_of_run(folder, DitSettings, OF_RUNS, lambda *_: None, use_ema)
