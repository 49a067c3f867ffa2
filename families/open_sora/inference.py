"""What inference scripts take of runs and files of Open-Sora: which networks, and what these say of themselves."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import model_validator

from families.common import inference_sources
from families.common.inference import RunSettings
from families.common.inference_sources import with_runs
from families.common.weight_files import GENERATOR, RUN_CONFIG
from families.open_sora.config import OpenSoraSettings
from families.open_sora.files import version_in
from families.open_sora.versions import VERSIONS
from warpcore.config_files import read_mapping

OF_RUNS = {"generator": GENERATOR, "lora": "lora"}
"""What runs export, and the key that takes each."""


class OpenSoraInferenceSettings(RunSettings, OpenSoraSettings):
    """The networks of Open-Sora, published or out of training runs."""

    of_training: ClassVar[Sequence[str]] = ()
    """Further keys of a run that are keys here, too."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_what_they_are(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What is not given comes from the runs, the last one first, and from the denoiser's file."""
        merged = with_runs(cls, values, cls.settings_of_run)
        given = merged.get("model_version")
        if isinstance(path := merged.get(GENERATOR), Path) and (not given or path.exists()):
            found = version_in(path, GENERATOR)
            if given and found not in (None, given):
                raise ValueError(
                    f"model_version: {given}, but {path} is an {VERSIONS[found].title} of {found}: remove the key"
                )
            merged |= {"model_version": given or found}
        known = {key: value for key, value in merged.items() if key != "model_version" or value is not None}
        return cls.with_defaults(known)

    @classmethod
    def with_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values with defaults that follow from others, such as `model_version`."""
        return values

    @classmethod
    def settings_of_run(cls, folder: Path, use_ema: bool = True) -> dict[str, Any]:
        """See `families.common.inference_sources.settings_of_run`."""
        found = inference_sources.settings_of_run(folder, OpenSoraSettings, OF_RUNS, lambda *_: None, use_ema)
        saved = read_mapping(folder / RUN_CONFIG)
        return found | {key: saved[key] for key in cls.of_training if saved.get(key) is not None}
