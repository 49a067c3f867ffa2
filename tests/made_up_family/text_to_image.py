"""Pictures for prompts by the made-up family."""

from functools import partial
from pathlib import Path
from typing import Any

from pydantic import model_validator

from families.common.inference import read_run
from families.common.lora import merge_loras
from families.common.lora_files import read_loras
from families.common.pipeline import Pipeline
from families.common.sampling import draw_latents
from families.common.text_to_image import Drawn, TextToImageConfig
from tests.made_up_family import settings
from tests.made_up_family.networks import COMPRESSION


class MadeUpTextToImageConfig(TextToImageConfig, settings.MadeUpSettings):
    """Keys of the made-up family."""

    lora: list[str] = []
    """LoRAs to add."""

    @model_validator(mode="before")
    @classmethod
    def _of_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        for run in values.get("run") or []:
            saved, exported = read_run(Path(run), ("generator", "lora"), values.get("use_ema", True))
            known = {key: saved[key] for key in settings.MadeUpSettings.model_fields}
            files = {"generator_checkpoint_path": exported.get("generator") or known["generator_checkpoint_path"]}
            values = known | files | {"lora": [str(exported["lora"])] if "lora" in exported else []} | values
        return values


class MadeUpTextToImage(Pipeline):
    Config = MadeUpTextToImageConfig
    num_conditions = 0

    def draw(self, prompts, seeds) -> Drawn:
        config = self.settings
        with self.holding("letters", settings.letters) as letters:
            asked, nothing = ({"letters": letters(texts)} for texts in (list(prompts), [""]))
        shape = (4, *(side // COMPRESSION for side in config.size_px))
        with self.holding("cloud", settings.cloud) as cloud:
            merge_loras(
                cloud, [(read_loras(Path(file), {"generator": cloud})["generator"], 1.0) for file in config.lora]
            )
            draw = partial(draw_latents, settings.process(config), cloud, shape=shape, steps=config.steps,
                           guidance=config.guidance, sampler=config.sampler)  # fmt: skip
            latents = self.in_batches("cloud", [0] * len(seeds), lambda rows: draw(
                self.rows(asked, rows), self.rows(nothing, rows), seeds=[seeds[i] for i in rows]))  # fmt: skip
        with self.holding("squeeze", settings.squeeze) as squeeze:
            return Drawn(
                self.in_batches("squeeze", [0] * len(seeds), lambda rows: squeeze.decode(self.batch(latents, rows)))
            )

    def notes(self) -> list[str]:
        return [self.peak_memory()]
