"""What inference scripts take of runs and files of Stable Diffusion: which networks, and what these say about them."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common import inference_sources
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import AUTOENCODER, GENERATOR, RUN_CONFIG, TEXT
from families.common.weight_source import local_weights
from families.stable_diffusion.components import T5_PART, find_component, holds
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.t5_texts import PROJECTION, t5_beside
from warpcore.config_files import read_mapping

OF_RUNS = {"generator": GENERATOR, "autoencoder": AUTOENCODER, "text_encoder": TEXT, "lora": "lora"}
"""What runs export, and the key that takes each."""


class SdInferenceSettings(RunSettings, SdSettings):
    """The networks of a whole Stable Diffusion, published or out of training runs."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from what the U-Net's file says of itself."""
        merged = with_runs(cls, values, settings_of_run)
        if merged.get(GENERATOR) and isinstance(merged[GENERATOR], str | Path):
            unet = find_component(merged[GENERATOR], "unet", GENERATOR)
            has_t5 = merged.get("text_model", unet.text_model) == "t5"
            said = {
                "model_version": unet.version, "diffusion_target": unet.diffusion_target,
                "zero_terminal_snr": unet.zero_terminal_snr, "text_model": unet.text_model,
                "text_tokens": unet.text_tokens if has_t5 else None, "clip_skip": None if has_t5 else unet.clip_skip,
            }  # fmt: skip
            merged = _given(said) | _given(merged)
        return merged


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """See `families.common.inference_sources.settings_of_run`."""

    def beside(place: Path, component: str, key: str) -> Path | None:
        has_t5 = component == "text_encoder" and t5_beside(place) is not None
        return place if has_t5 or holds(place, component, GENERATOR) else None

    found = inference_sources.settings_of_run(folder, SdSettings, OF_RUNS, beside, use_ema)
    base = read_mapping(folder / RUN_CONFIG).get(GENERATOR)
    if found.get("text_model") == "t5" and base is not None and PROJECTION not in found:
        place = local_weights(Path(base), GENERATOR)
        found |= {PROJECTION: str(place)} if (place / T5_PART).is_dir() else {}
    return found


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
