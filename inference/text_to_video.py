"""Draw videos for prompts with the networks of any family: out of training runs, or published ones.

    python3 inference/text_to_video.py --run runs/quickstart_video --prompts "a red box moves left at the top"
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml --resolution 480p --aspect-ratio 9:16 \\
        --num-frames 4s --prompts "a dog on a beach" --seeds 1
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml --loop 4 --condition-frame-length 5 \\
        --prompts "|0|a jeep on a beach|2|the jeep in a forest"
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml \\
        --prompts 'waves at sunset{"reference_path": "wave.png", "mask_strategy": "0"}'

The family follows from the run or the weights that the arguments name; `--help` beside them lists its keys.
"""

import warpcore.openmp
import sys
from itertools import product

from families.common.drawn_pictures import MAX_PICTURES
from families.common.family import TEXT_TO_VIDEO
from families.common.text_to_video import VideoFiles, video_names
from families.registry import load_task
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder

TASK = TEXT_TO_VIDEO


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    task = kind(config)
    if (count := len(task.titles) * len(config.seeds)) > MAX_PICTURES:
        raise UserError(f"{count} videos of as many prompts and seeds: at most {MAX_PICTURES} are drawn at once")
    numbers, seeds = zip(*product(range(len(task.titles)), config.seeds), strict=True)
    titles, folder = [task.titles[number] for number in numbers], config.output_path or free_folder("videos")
    ending = ".mp4" if task.total_frames > 1 else ".png"
    files = [folder / name for name in video_names(titles, seeds, config, ending)]
    check_new(files, "give another output_path, or write overwrite=true", config.overwrite)
    videos = VideoFiles(config, files, titles, seeds)
    task.draw(numbers, seeds, videos.save)
    videos.finish()
    for note in task.notes():
        print(note)


if __name__ == "__main__":
    run_script(main)
