"""Draw videos for prompts with the networks of any family: out of training runs, or published ones.

    python3 inference/text_to_video.py --run runs/quickstart_video --prompts "a red box moves left at the top"
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml --resolution 480p --aspect-ratio 9:16 \\
        --num-frames 4s --prompts "a dog on a beach" --seeds 1
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml --loop 4 --condition-frame-length 5 \\
        --prompts "|0|a jeep on a beach|2|the jeep in a forest"
    torchrun --nproc-per-node 4 inference/text_to_video.py configs/inference/open_sora_1_2.yaml --prompts "a dog"
    python3 inference/text_to_video.py configs/inference/open_sora_1_2.yaml \\
        --prompts 'waves at sunset{"reference_path": "wave.png", "mask_strategy": "0"}'

The family follows from the run or the weights that the arguments name; `--help` beside them lists its keys. Several
processes draw each video together where the network can share its tokens, and in groups share the prompts.
"""

import warpcore.openmp
import sys
from itertools import product

import numpy as np

from families.common.drawn_pictures import MAX_PICTURES
from families.common.family import TEXT_TO_VIDEO
from families.common.prompt_weights import about_weights
from families.common.text_to_video import (
    LONGEST_DRAWING,
    TextToVideo,
    TextToVideoConfig,
    VideoFiles,
    in_groups,
    video_names,
)
from families.registry import load_task
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder
from warpcore.peers import explained, tell_once
from warpcore.processes import Processes, start_processes, stop_processes

TASK = TEXT_TO_VIDEO


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    try:
        with explained():
            draw(kind(config), config, start_processes(config.device))
    finally:
        stop_processes()


def draw(task: TextToVideo, config: TextToVideoConfig, processes: Processes) -> None:
    processes = in_groups(processes, task.heads, config.sequence_shards)
    if (count := len(task.titles) * len(config.seeds)) > MAX_PICTURES:
        raise UserError(f"{count} videos of as many prompts and seeds: at most {MAX_PICTURES} are drawn at once")
    numbers, seeds = zip(*product(range(len(task.titles)), config.seeds), strict=True)
    titles = [task.titles[number] for number in numbers]
    folder = config.output_path or processes.decide(free_folder("videos"))
    ending = ".mp4" if task.total_frames > 1 else ".png"
    files = [folder / name for name in video_names(titles, seeds, config, ending)]
    remedy = "give another output_path, or write overwrite=true, or skip_existing=true"
    processes.on_main(lambda: check_new(files, remedy, config.overwrite or config.skip_existing))
    videos = VideoFiles(config, files, titles, seeds)
    missing = processes.on_main(lambda: videos.missing(task.total_frames))
    waiting = processes.another_group(LONGEST_DRAWING)
    own = missing[processes.data_rank :: processes.data_count]

    def finished(number: int, video: np.ndarray) -> None:
        if processes.counts_data:
            videos.save(own[number], video)

    if own:
        task.draw([numbers[i] for i in own], [seeds[i] for i in own], finished, processes.sequence_group)
    videos.finish(processes, waiting)
    for note in [*about_weights([*titles, config.negative_prompt]), *task.notes()] if processes.is_main else ():
        print(note)


if __name__ == "__main__":
    run_script(main, tell_once)
