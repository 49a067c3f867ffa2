"""Draw pictures for prompts with Stage C and the previewer.

python3 inference/text_to_image.py configs/inference/quickstart.yaml
python3 inference/text_to_image.py run=runs/quickstart_c prompts='["a red circle on the left"]' seeds=[1,2,3]
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

import torch
import yaml
from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator
from tqdm import tqdm

from cascade import build
from cascade.conditions import prompt_conditions
from cascade.config import ModelSettings
from cascade.diffusion import draw_latents, make_diffusion, stage_c_latent_size
from cascade.pictures import to_pictures
from warpcore.config import ConfigError, Share, load_config
from warpcore.data.buckets import parse_ratio
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.errors import run_script
from warpcore.pictures import grid, save_png
from warpcore.processes import choose_device, choose_dtype


class TextToImageConfig(ModelSettings):
    """Keys of this script, beside those of the networks."""

    run: Path | None = None
    """Folder of a training run: its weights and model settings are used."""
    use_ema: bool = True
    """With `run`: take the averaged weights, where there are some."""
    output_path: Path = Path("pictures")
    """Folder for `grid.png` and the single pictures; each file holds its prompt and settings."""
    prompts: list[str] = []
    """What to draw."""
    prompt_file: Path | None = None
    """A text file with a prompt per line, drawn after `prompts`."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    seeds: list[int] = [0]
    """Each prompt is drawn once for each of these; a seed gives the same noise whatever else is drawn."""
    image_size: PositiveInt = 1024
    """Side of a square picture in pixels; other shapes get about the same area."""
    aspect_ratio: PositiveFloat = 1.0
    """Width divided by height: 1.5, 3/2 or 16:9."""
    size: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] in pixels, instead of the two keys above."""
    steps: PositiveInt = 20
    """Sampling steps."""
    guidance: float | None = 4.0
    """Classifier-free guidance: 1 follows the prompt as trained, more follows it harder; null computes none."""
    guidance_rescale: Share = 0.7
    """Share of the guided prediction that is scaled back to the contrast of the unguided one; 0 for none."""
    sampler: Literal[tuple(SAMPLERS)] = "ddpm"
    """`ddpm` is the published one; `dpmpp_2m` needs the fewest steps."""
    shift: PositiveFloat = 1.0
    """Moves the noise schedule towards more noise (> 1) for larger pictures."""
    batch_size: PositiveInt = 8
    """Pictures drawn at once."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision; by default bfloat16 on CUDA, else float32."""

    @field_validator("aspect_ratio", mode="before")
    @classmethod
    def _ratio(cls, value: Any) -> float:
        return parse_ratio(value)

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_run(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Model settings that are not given come from the run."""
        if not values.get("run"):
            return values
        folder = Path(values["run"])
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"run: {folder} is no training run: it holds no config.yaml")
        of_run = yaml.safe_load((folder / "config.yaml").read_text())
        names = [name for name in ("generator_ema", "generator") if values.get("use_ema", True) or name == "generator"]
        found = [folder / f"{name}.safetensors" for name in names if (folder / f"{name}.safetensors").is_file()]
        if not found:
            raise ValueError(f"run: {folder} holds no weights yet (generator.safetensors): wait for its first save")
        kept = {key: of_run[key] for key in ModelSettings.model_fields if of_run.get(key) is not None}
        return kept | {"generator_checkpoint_path": found[0]} | values

    @model_validator(mode="after")
    def _something_to_draw(self) -> Self:
        if not self.prompts and self.prompt_file is None:
            raise ValueError("nothing to draw: give prompts or prompt_file")
        if self.generator_checkpoint_path is None:
            raise ValueError("no weights of Stage C: give run or generator_checkpoint_path")
        return self

    @property
    def size_px(self) -> tuple[int, int]:
        if self.size:
            return self.size
        side = self.image_size / self.aspect_ratio**0.5
        return round(side), round(side * self.aspect_ratio)


def main() -> None:
    config = load_config(TextToImageConfig)
    prompts = [*config.prompts, *_lines(config.prompt_file)]
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    builders = {"text": build.text, "generator": build.stage_c, "previewer": build.previewer}
    text, generator, previewer = (make(config).to(device, dtype).eval() for make in builders.values())
    diffusion = make_diffusion(config.diffusion_target)
    height, width = config.size_px
    version = config.version
    shape = (16, *stage_c_latent_size(height, width, version.compression, version.patch_size))
    wanted = [(prompt, seed) for prompt in prompts for seed in config.seeds]
    pictures = []
    for start in tqdm(range(0, len(wanted), config.batch_size), desc="drawing", unit="batch"):
        chosen = wanted[start : start + config.batch_size]
        image_width = generator.clip_img_mapper.in_features
        with torch.inference_mode():
            latents = draw_latents(
                diffusion,
                generator,
                prompt_conditions(text, [prompt for prompt, _ in chosen], image_width, device),
                prompt_conditions(text, [config.negative_prompt] * len(chosen), image_width, device),
                shape,
                [seed for _, seed in chosen],
                steps=config.steps,
                guidance=config.guidance,
                guidance_rescale=config.guidance_rescale,
                sampler=config.sampler,
                shift=config.shift,
            )
            pictures += list(to_pictures(previewer(latents.to(dtype)), (height, width)))
    settings = config.model_dump_json(include={"steps", "guidance", "sampler", "shift", "negative_prompt", "run"})
    for number, (picture, (prompt, seed)) in enumerate(zip(pictures, wanted, strict=True)):
        name = f"{number:04d}_{re.sub(r'[^a-z0-9]+', '_', prompt.lower())[:60].strip('_')}_{seed}.png"
        save_png(config.output_path / name, picture, {"prompt": prompt, "seed": str(seed), "settings": settings})
    columns = len(config.seeds) if len(config.seeds) > 1 else min(6, len(wanted))
    sheet = grid(pictures, columns, [prompt for prompt, _ in wanted])
    save_png(config.output_path / "grid.png", sheet, {"prompts": "\n".join(prompts), "settings": settings})
    print(f"{len(pictures)} pictures, and all of them together: {config.output_path / 'grid.png'}")
    print("They are drawn by the previewer, which is coarser than the full cascade.")


def _lines(path: Path | None) -> list[str]:
    if path is None:
        return []
    if not path.is_file():
        raise ConfigError(f"prompt_file: {path} does not exist")
    lines = [line.strip() for line in path.read_text().splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise ConfigError(f"prompt_file: {path} holds no prompt; write one per line")
    return prompts


if __name__ == "__main__":
    run_script(main)
