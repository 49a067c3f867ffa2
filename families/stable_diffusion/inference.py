"""What inference scripts take of runs and files of Stable Diffusion: which networks, and what these say about them."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common.inference import RunSettings, read_run, runs_of
from families.common.weight_source import given_weights, local_weights
from families.stable_diffusion.build import AUTOENCODER, GENERATOR, TEXT
from families.stable_diffusion.components import find_component, holds
from families.stable_diffusion.config import SdSettings
from warpcore.keys import weights_keys

OF_RUNS = {"generator": GENERATOR, "autoencoder": AUTOENCODER, "text_encoder": TEXT, "lora": "lora"}
"""What runs export, and the key that takes each."""


class SdInferenceSettings(RunSettings, SdSettings):
    """The networks of a whole Stable Diffusion, published or out of training runs."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from what the U-Net's file says of itself."""
        runs, folders = runs_of(values)
        found: dict[str, Any] = {}
        loras: list[str] = []
        for folder in folders:
            of_run = settings_of_run(folder, values.get("use_ema", True))
            loras += of_run.pop("lora", [])
            found |= of_run
        if loras:
            given = values.get("lora") or []
            values = values | {"lora": loras + (given if isinstance(given, list) else [given])}
        if values.get(GENERATOR):  # another U-Net than that of the run says itself what it is
            found = {key: value for key, value in found.items() if key in (AUTOENCODER, TEXT)}
        merged = found | values | {"run": runs}
        for key in weights_keys(cls):
            if merged.get(key) and isinstance(merged[key], str | Path):
                merged[key] = given_weights(Path(merged[key]), key, merged.get("use_ema", True))
        if merged.get(GENERATOR) and isinstance(merged[GENERATOR], str | Path):
            unet = find_component(merged[GENERATOR], "unet", GENERATOR)
            said = {
                "model_version": unet.version, "diffusion_target": unet.diffusion_target,
                "zero_terminal_snr": unet.zero_terminal_snr,
            }  # fmt: skip
            merged = {key: value for key, value in said.items() if value is not None} | _given(merged)
        return merged


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """The keys of `SdInferenceSettings` that say what a training run made, and of which networks; `lora` is a list.

    Raises:
        ValueError: it is not a run's folder, or holds no weights yet.
    """
    of_run, trained = read_run(folder, OF_RUNS, use_ema)
    kept = {key: of_run[key] for key in SdSettings.model_fields if of_run.get(key) is not None}
    base = kept.get(GENERATOR)
    if base is not None:  # what stood beside the U-Net that the run began with, stays beside the one that it trained
        beside = local_weights(Path(base), GENERATOR)
        for key, component in ((AUTOENCODER, "vae"), (TEXT, "text_encoder")):
            if key not in kept and holds(beside, component, GENERATOR):
                kept[key] = base
    kept |= {OF_RUNS[name]: str(file) for name, file in trained.items() if name != "lora"}
    if "lora" in trained:
        kept["lora"] = [str(trained["lora"])]
    return kept


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
