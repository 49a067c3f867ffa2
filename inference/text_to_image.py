"""Draw pictures for prompts with the networks of any family: out of training runs, or published ones.

    python3 inference/text_to_image.py configs/inference/quickstart.yaml
    python3 inference/text_to_image.py --run runs/quickstart_c --image_size 128 --prompts "a red circle" --seeds 1
    python3 inference/text_to_image.py configs/inference/text_to_image_3b.yaml --image dog.jpg --noise_level 0.8
    python3 inference/text_to_image.py --run runs/quickstart_lora --image_size 128 --prompts "a green [heart]"
    python3 inference/text_to_image.py configs/inference/text_to_image_3b.yaml --lora dog.safetensors:0.8 \\
        --controlnet models/canny.safetensors --control_image house.jpg --prompts "a gingerbread house"

The family follows from the run or the weights that the arguments name; `--help` beside them lists its keys.
"""

import warpcore.openmp
import re
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from families.common.family import TEXT_TO_IMAGE
from families.common.pictures import to_pictures
from families.common.text_to_image import Drawn, TextToImageConfig
from families.registry import load_task
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder
from warpcore.pictures import grid, save_png

TASK = TEXT_TO_IMAGE
MAX_PICTURES = 100_000


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    task = kind(config)
    if (count := len(config.all_prompts) * len(config.seeds)) > MAX_PICTURES:
        raise UserError(f"{count} pictures of as many prompts and seeds: at most {MAX_PICTURES} are drawn at once")
    prompts, seeds = zip(*product(config.all_prompts, config.seeds), strict=True)
    folder = config.output_path or free_folder("pictures")
    files = [folder / name for name in file_names(prompts, seeds, task.num_conditions)]
    check_new(files, "give another output_path, or write overwrite=true", config.overwrite)
    save(config, files, prompts, seeds, task.draw(prompts, seeds))
    for note in task.notes():
        print(note)


def file_names(prompts: Sequence[str], seeds: Sequence[int], num_conditions: int) -> list[str]:
    """Of a picture for each prompt and its seed, of each condition, and of the sheet with all pictures."""
    pairs = enumerate(zip(prompts, seeds, strict=True))
    words = [re.sub(r"[^a-z0-9]+", "_", prompt.lower())[:60].strip("_") for prompt in prompts]
    names = [f"{number:04d}_{words[number]}_{seed}.png" for number, (_, seed) in pairs]
    return [*names, *(f"condition_{number}.png" for number in range(num_conditions)), "grid.png"]


def save(
    config: TextToImageConfig, files: Sequence[Path], prompts: Sequence[str], seeds: Sequence[int], drawn: Drawn
) -> None:
    """Write each picture, with what it was made of inside, each condition, and a sheet of all pictures."""
    left_out = {"prompts", "prompt_file", "seeds", "output_path", "overwrite", "device", "batch_size"}
    settings = config.model_dump_json(exclude=left_out, exclude_defaults=True)
    sheet = [to_pictures(picture[None], config.size_px)[0] for picture in drawn.pictures]
    for file, picture, prompt, seed in zip(files, sheet, prompts, seeds, strict=False):
        save_png(file, picture, {"prompt": prompt, "seed": str(seed), "settings": settings})
    for file, condition in zip(files[len(sheet) :], drawn.conditions, strict=False):
        save_png(file, to_pictures(condition[None], config.size_px)[0])
    columns = len(config.seeds) if len(config.seeds) > 1 else min(6, len(sheet))
    together = grid(sheet, columns, prompts)
    save_png(files[-1], together, {"prompts": "\n".join(prompts), "settings": settings})
    print(f"{len(sheet)} pictures, and all of them together: {files[-1]}")


if __name__ == "__main__":
    run_script(main)
