"""What inference scripts take of runs and files of PixArt-alpha: which networks, and what these say about them."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common import inference_sources
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.library_files import component_folder
from families.common.weight_files import AUTOENCODER, GENERATOR, TARGET_KEY, TEXT, target_of
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_files import find_denoiser
from families.dit.pixart_versions import version_of

OF_RUNS = {"generator": GENERATOR, "lora": "lora"}
"""What runs export, and the key that takes each."""
BESIDE = {AUTOENCODER: "vae", TEXT: "text_encoder"}
"""Folders of a pipeline of diffusers, and the key that takes each."""


class PixartInferenceSettings(RunSettings, PixartSettings):
    """The networks of a whole PixArt-alpha, published or out of training runs."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from the denoiser's file or pipeline."""
        merged = with_runs(cls, values, settings_of_run)
        if isinstance(path := merged.get(GENERATOR), Path):
            config = find_denoiser(path, GENERATOR).config
            said = {"model_version": version_of(config), TARGET_KEY: target_of(path)}
            said |= {key: beside(path, name, key) for key, name in BESIDE.items()}
            known = {key: value for key, value in said.items() if value is not None}
            merged = known | {key: value for key, value in merged.items() if value is not None}
        return merged


def beside(base: Path, name: str, key: str) -> Path | None:
    """A network in the same pipeline of diffusers as a denoiser; None where there is none."""
    for pipeline in (base, base.parent):
        if (folder := component_folder(pipeline, name)) != pipeline and (pipeline / "model_index.json").is_file():
            return folder
    return None


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """See `families.common.inference_sources.settings_of_run`."""
    return inference_sources.settings_of_run(folder, PixartSettings, OF_RUNS, beside, use_ema)
