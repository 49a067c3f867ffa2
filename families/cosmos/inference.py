"""What inference scripts take of runs and files of Cosmos-Predict2: which networks, and what these say about them."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common.inference import RunSettings, read_run, runs_of
from families.common.weight_source import given_weights, local_weights
from families.cosmos.build import AUTOENCODER, GENERATOR, TEXT
from families.cosmos.components import find_beside, find_transformer
from families.cosmos.config import CosmosSettings
from families.cosmos.versions import version_of
from warpcore.keys import weights_keys

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
        if values.get(GENERATOR):  # another denoiser than that of the run says itself what it is
            found = {key: value for key, value in found.items() if key in (AUTOENCODER, TEXT)}
        merged = found | values | {"run": runs}
        for key in weights_keys(cls):
            if merged.get(key) and isinstance(merged[key], str | Path):
                merged[key] = given_weights(Path(merged[key]), key, merged.get("use_ema", True))
        if merged.get("model_version") is None and isinstance(merged.get(GENERATOR), Path):
            config = find_transformer(merged[GENERATOR], GENERATOR).config
            merged |= {"model_version": version_of(config) or "mini"}
        return merged


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """The keys of `CosmosInferenceSettings` that say what a run made, and of which networks; `lora` is a list.

    Raises:
        ValueError: it is not a run's folder, or holds no weights yet.
    """
    of_run, trained = read_run(folder, OF_RUNS, use_ema)
    kept = {key: of_run[key] for key in CosmosSettings.model_fields if of_run.get(key) is not None}
    base = kept.get(GENERATOR)
    if (
        base is not None
    ):  # what stood beside the denoiser that the run began with, stays beside the one that it trained
        beside = local_weights(Path(base), GENERATOR)
        for key, component in ((AUTOENCODER, "vae"), (TEXT, "text_encoder")):
            if key not in kept and (found := find_beside(beside, component, key)) is not None:
                kept[key] = str(found.path)
    kept |= {OF_RUNS[name]: str(file) for name, file in trained.items() if name != "lora"}
    if "lora" in trained:
        kept["lora"] = [str(trained["lora"])]
    return kept
