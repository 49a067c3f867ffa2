"""Configuration keys of scripts that use a whole cascade, published or out of training runs."""

import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveFloat, model_validator

from families.cascade.config import ModelSettings
from families.cascade.files import STAGE_B_TENSOR, STEERING, WEIGHT_KEYS
from families.common.inference import ComputeSettings, RunSettings, read_run, runs_of
from families.common.weight_files import TARGET_KEY, contradictions, read_header, target_of
from families.common.weight_source import given_weights
from warpcore.config import Share
from warpcore.config_keys import Steps
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.keys import Weights, weights_keys

STAGE_B_OF = {"3.6B": "3B", "1B": "700M", "mini": "mini"}
"""The size of Stage B that belongs to a size of Stage C."""
logger = logging.getLogger(__name__)


class CascadeSettings(RunSettings, ModelSettings):
    """The networks of a whole cascade.

    Keys of `ModelSettings` are those of Stage C and what stands around it.
    """

    stage_b_version: Literal["3B", "700M", "mini"] | None = None
    """Size of Stage B; by default the one that belongs to `model_version`."""
    stage_b_checkpoint_path: Weights | None = None
    """Weights of Stage B; by default where `models/download.py` puts them."""
    stage_b_target: Literal["epsilon", "x0", "v", "rectified_flows"] | None = None
    """What Stage B predicts; by default what its weights file says, else noise (`epsilon`)."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from what the weights file says of itself."""
        given = {key: values.get(key) for key in weights_keys(cls) if key not in cls.unused}
        named = {key: Path(value) for key, value in given.items() if value and isinstance(value, str | Path)}
        use_ema = values.get("use_ema", True)
        values = values | {key: given_weights(path, key, use_ema) for key, path in named.items()}
        runs, folders = runs_of(values)
        of_runs = [settings_of_run(folder, values.get("use_ema", True)) for folder in folders]
        found = {key: value for of_run in of_runs for key, value in of_run.items()}
        for key in found.keys() & STEERING:
            if key not in cls.model_fields:
                raise ValueError(f"run: one of {', '.join(map(str, runs))} trained a {key}, for which there is no use "
                                 "here: name the run of its Stage C instead")  # fmt: skip
            given = values.get(key) or []
            found[key] = [place for of_run in of_runs for place in of_run.get(key, [])]
            values = values | {key: found[key] + (given if isinstance(given, list) else [given])}
        of_stage_c = [of_run for of_run in of_runs if "generator_checkpoint_path" in of_run]
        if of_stage_c:  # the sizes of others are those that usually go with theirs
            found["model_version"] = of_stage_c[-1]["model_version"]
        for path, target in (("generator_checkpoint_path", TARGET_KEY), ("stage_b_checkpoint_path", "stage_b_target")):
            if path in values:
                found.pop(target, None)
        merged = found | values | {"run": runs}
        path = merged.get("generator_checkpoint_path")
        if merged.get(TARGET_KEY) is None and (path is None or isinstance(path, str | Path)):
            merged[TARGET_KEY] = target_of(path) or "epsilon"
        return merged

    @property
    def stage_b(self) -> ModelSettings:
        """The settings of Stage B, named as its training script names them; no weights where none are to be found."""
        version = self.stage_b_version or STAGE_B_OF[self.model_version]
        settings = self.model_copy(update={"model_version": version, "generator_checkpoint_path": None})
        files = [settings.version.folder / name for name in settings.version.stage_b_files]
        path = self.stage_b_checkpoint_path or next((file for file in files if file.is_file()), None)
        target = self.stage_b_target or target_of(path) or "epsilon"
        return settings.model_copy(update={"generator_checkpoint_path": path, "diffusion_target": target})


OF_STAGE_B = (
    "stage_b_version", "stage_b_checkpoint_path", "stage_b_target", "stage_b_steps", "stage_b_guidance",
    "stage_b_sampler", "stage_b_shift",
)  # fmt: skip
"""Keys about Stage B alone."""


class DrawingSettings(CascadeSettings, ComputeSettings):
    """How Stage B draws."""

    stage_b_steps: Steps = 10
    """Sampling steps of Stage B."""
    stage_b_guidance: float | None = 1.1
    """Classifier-free guidance of Stage B; null computes none."""
    stage_b_sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """Sampler of Stage B."""
    stage_b_shift: PositiveFloat = 1.0
    """Moves the noise schedule of Stage B towards more noise (> 1)."""
    guidance_rescale: Share = 0.7
    """Share of the guided prediction that is scaled back to the contrast of the unguided one; 0 for none."""

    @property
    def stage_b_sampling(self) -> dict[str, Any]:
        """The arguments of `draw_latents` for Stage B."""
        return {
            "steps": self.stage_b_steps,
            "guidance": self.stage_b_guidance,
            "guidance_rescale": self.guidance_rescale,
            "sampler": self.stage_b_sampler,
            "shift": self.stage_b_shift,
        }


def warn_of_contradictions(path: Path, settings: ModelSettings) -> None:
    """Log what a LoRA or ControlNet says of the network that it steers, where that is another one here."""
    for key, (said, here) in contradictions(path, settings, (TARGET_KEY, *settings.about_network)).items():
        logger.warning("%s says that it was trained with %s %s, and draws with %s here", path, key, said, here)


def settings_of_run(folder: Path, use_ema: bool = True) -> dict[str, Any]:
    """The keys of `CascadeSettings` that say what a training run made, and of which networks.

    Raises:
        ValueError: it is not a run's folder, or holds no weights yet.
    """
    of_run, trained = read_run(folder, WEIGHT_KEYS, use_ema)
    kept = {key: of_run[key] for key in ModelSettings.model_fields if of_run.get(key) is not None}
    version, target = kept.get("model_version"), kept.pop(TARGET_KEY, None)
    base = kept.pop("generator_checkpoint_path", None)
    # What weights say of themselves counts, whatever the config has become.
    target = next(filter(None, map(target_of, trained.values())), target)
    if steering := {name: [str(trained[name])] for name in STEERING if name in trained}:
        return kept | steering | {"generator_checkpoint_path": base, TARGET_KEY: target}
    kept |= {WEIGHT_KEYS[name]: str(file) for name, file in trained.items() if name != "generator"}
    generator = trained.get("generator")
    if generator is None:
        return kept
    if STAGE_B_TENSOR not in read_header(generator).names:
        return kept | {"generator_checkpoint_path": str(generator), TARGET_KEY: target}
    of_stage_b = {"stage_b_checkpoint_path": str(generator), "stage_b_version": version, "stage_b_target": target}
    stage_c = next((stage_c for stage_c, stage_b in STAGE_B_OF.items() if stage_b == version), version)
    return kept | of_stage_b | {"model_version": stage_c}
