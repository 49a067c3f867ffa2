"""What inference scripts take of runs and files of DiT and Latte: which networks, and what these say of themselves."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveFloat, PositiveInt, model_validator

from families.common import inference_sources
from families.common.classes import NAMES_KEY, names_said
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import GENERATOR, RUN_CONFIG, TARGET_KEY, metadata_of, target_of
from families.dit.autoencoder import latents_of
from families.dit.config import DitSettings
from families.dit.files import dit_numbers
from families.dit.latte_config import DEFAULT_FPS, LatteSettings
from families.dit.versions import version_of
from warpcore.config_files import read_mapping
from warpcore.idle_keys import Need

OF_RUNS = {"generator": GENERATOR}
"""What runs export, and the key that takes it."""


class DitInferenceSettings(RunSettings, DitSettings):
    """A DiT with its autoencoder, published or out of a training run."""

    of_network: ClassVar[tuple[str, ...]] = ("num_classes", "learn_sigma")
    """Constructor numbers of the network that are keys, too."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the run, and from what the denoiser's file shows."""
        merged = with_runs(cls, values, cls.settings_of_run)
        if isinstance(path := merged.get(GENERATOR), Path):
            config = dit_numbers(path, GENERATOR)
            said = {key: config[key] for key in cls.of_network if key in config}
            said |= {"model_version": version_of(config), TARGET_KEY: target_of(path)}
            said[NAMES_KEY] = names_said(metadata_of(path), f"the class names of {path}") or None
            known = {key: value for key, value in said.items() if value is not None}
            merged = known | {key: value for key, value in merged.items() if value is not None}
        return merged

    @property
    def trained_px(self) -> int:
        """Side of the squares that the weights were trained with, or of such an area, in px."""
        size = dit_numbers(self.generator_checkpoint_path, GENERATOR).get("input_size")
        if size is None:
            return self.version.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return round((height * width) ** 0.5) * latents_of(self)[1]

    @classmethod
    def settings_of_run(cls, folder: Path, use_ema: bool = True) -> dict[str, Any]:
        """See `families.common.inference_sources.settings_of_run`."""
        return inference_sources.settings_of_run(folder, DitSettings, OF_RUNS, lambda *_: None, use_ema)


class LatteInferenceSettings(DitInferenceSettings, LatteSettings):
    """A Latte with its autoencoder, published or out of a training run."""

    of_network = (*DitInferenceSettings.of_network, "num_frames")
    needs = {"fps": Need("clips of several frames", lambda config: config.clip_frames > 1)}

    num_frames: PositiveInt | None = None
    """Frames of each clip, by default as many as the network was trained with; 1 draws pictures."""
    fps: PositiveFloat = DEFAULT_FPS
    """Frames per second at which clips are written, by default the `frame_rate` of the training, or else 8, as
    published. It changes nothing of what is drawn."""

    @classmethod
    def settings_of_run(cls, folder: Path, use_ema: bool = True) -> dict[str, Any]:
        found = inference_sources.settings_of_run(folder, LatteSettings, OF_RUNS, lambda *_: None, use_ema)
        rate = read_mapping(folder / RUN_CONFIG).get("frame_rate")
        return found | ({} if rate is None else {"fps": rate})

    @property
    def clip_frames(self) -> int:
        return self.num_frames or 16
