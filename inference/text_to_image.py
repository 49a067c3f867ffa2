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
import sys
from itertools import product

from families.common.drawn_pictures import MAX_PICTURES, file_names, save_drawn
from families.common.family import TEXT_TO_IMAGE
from families.common.prompt_weights import about_weights
from families.registry import load_task
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder

TASK = TEXT_TO_IMAGE


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    task = kind(config)
    if (count := len(config.all_prompts) * len(config.seeds)) > MAX_PICTURES:
        raise UserError(f"{count} pictures of as many prompts and seeds: at most {MAX_PICTURES} are drawn at once")
    prompts, seeds = zip(*product(config.all_prompts, config.seeds), strict=True)
    folder = config.output_path or free_folder("pictures")
    files = [folder / name for name in file_names(prompts, seeds, task.num_conditions)]
    check_new(files, "give another output_path, or write overwrite=true", config.overwrite)
    drawn = task.draw(prompts, seeds)
    save_drawn(config, files, "prompt", prompts, seeds, drawn, left_out={"prompts", "prompt_file"})
    for note in [*about_weights([*prompts, config.negative_prompt]), *task.notes()]:
        print(note)


if __name__ == "__main__":
    run_script(main)
