"""Draw pictures or clips of classes with the networks of any family: out of training runs, or published ones.

    python3 inference/class_to_image.py --run runs/quickstart_dit --classes '["red circle", "blue star"]'
    python3 inference/class_to_image.py --generator_checkpoint_path models/DiT-XL-2-256x256.pt --classes '[207, 360]'
    python3 inference/class_to_image.py --run runs/quickstart_latte --classes '[left, up]' --num-frames 8 --fps 4

The family follows from the run or the weights that the arguments name; `--help` beside them lists its keys.
"""

import warpcore.openmp
import sys
from itertools import product

from families.common.drawn_pictures import MAX_PICTURES, file_names, save_drawn, written_files
from families.common.family import CLASS_TO_IMAGE
from families.registry import load_task
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder

TASK = CLASS_TO_IMAGE


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    task = kind(config)
    if (count := len(task.labels) * len(config.seeds)) > MAX_PICTURES:
        raise UserError(f"{count} pictures of as many classes and seeds: at most {MAX_PICTURES} are drawn at once")
    pairs = product(zip(task.labels, task.titles, strict=True), config.seeds)
    labels, titles, seeds = zip(*((label, title, seed) for (label, title), seed in pairs), strict=True)
    folder = config.output_path or free_folder("pictures")
    files = [folder / name for name in file_names(titles, seeds)]
    check_new(written_files(files, config), "give another output_path, or write overwrite=true", config.overwrite)
    save_drawn(config, files, "class", titles, seeds, task.draw(labels, seeds), left_out={"classes", "class_file"})
    for note in task.notes():
        print(note)


if __name__ == "__main__":
    run_script(main)
