"""Rebuild pictures and clips with the autoencoders of any family: out of training runs, or published ones.

    python3 inference/reconstruct.py --model_version 3.6B --pictures photos --output_path rebuilt
    python3 inference/reconstruct.py --run runs/mini_b --pictures demo/pictures/000
    python3 inference/reconstruct.py --run runs/mini_video_vae --pictures demo/videos/000 --num_frames 17

What an autoencoder loses, no drawing will have. PSNR (more is better, in dB) and SSIM (1 is equal) say how much that
is; those of a clip are the means of its frames, and its PSNR is told of each frame, too. The family follows from the
run or the weights that the arguments name; `--help` beside them lists its keys.
"""

import warpcore.openmp
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from families.common.family import RECONSTRUCTION
from families.common.originals import Original, read_originals
from families.common.pictures import image_metrics, to_pictures
from families.registry import load_task
from warpcore.clips import save_clip
from warpcore.data.picture_files import LeftOut, find_pictures
from warpcore.errors import run_script
from warpcore.evaluation import moving_sheet
from warpcore.outputs import check_new, free_folder
from warpcore.pictures import grid, save_png
from warpcore.results import Sampled

TASK = RECONSTRUCTION
CLIP_ENDINGS = (".mp4", ".webp")
"""Of the files that a clip is written to."""


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    folder, left_out = config.output_path or free_folder("reconstructions"), LeftOut()
    found = find_pictures(config.pictures, left_out, without=folder)
    originals = read_originals(
        found, config.most_pictures, left_out,
        side=config.image_size, num_frames=config.num_frames, stride=config.frame_stride,
    )  # fmt: skip
    outputs = [folder / f"{number:04d}_{one.file.stem}.png" for number, one in enumerate(originals)]
    outputs.append(folder / "grid.png")
    check_new(written_files(outputs, originals), "give another output_path, or write overwrite=true", config.overwrite)
    task = kind(config)
    show(outputs, originals, task.rebuild([one.pixels for one in originals]))
    for note in [*([left_out] if left_out else []), *task.notes()]:
        print(note)


def written_files(outputs: Sequence[Path], originals: Sequence[Original]) -> list[Path]:
    """What `show` writes for `outputs`."""
    rates = [*(one.fps for one in originals), None]
    clips = [file for file, fps in zip(outputs, rates, strict=True) if fps]
    clips += [outputs[-1]] if clips else []
    pictures = [file for file, fps in zip(outputs, rates, strict=True) if not fps]
    return [*pictures, *(file.with_suffix(ending) for file in clips for ending in CLIP_ENDINGS)]


def show(outputs: list[Path], originals: list[Original], rebuilt: dict[str, list[Tensor]]) -> None:
    """Print how near each came, and write it, and sheets with all of them beside the originals: of clips, one shows
    some frames, and one moves."""
    shown, captions, scores = [], [], {name: [] for name in rebuilt}
    rows = []
    width = max(len(str(one.file)) for one in originals)
    for number, (file, pixels, fps) in enumerate(originals):
        shown.append(to_pictures(pixels))
        captions.append(file.name)
        rows.append(Sampled(file.name, {"original": shown[-1]}))
        of_frames = []
        for name, made in rebuilt.items():
            psnr, ssim = frame_metrics(made[number], pixels)
            scores[name].append((mean(psnr), mean(ssim)))
            shown.append(to_pictures(made[number]))
            rows[-1].pictures[name] = shown[-1]
            captions.append(f"{name}: {mean(psnr):.1f} dB, {mean(ssim):.3f}")
            of_frames.append(f"  dB of each frame, {name}: " + " ".join(f"{value:.1f}" for value in psnr))
        if fps:
            save_clip(outputs[number], shown[-1], fps)
        else:
            save_png(outputs[number], shown[-1])
        print("\n".join([f"{file!s:{width}}  " + "  ".join(captions[-len(rebuilt) :]), *(of_frames if fps else ())]))
    for name, values in scores.items():
        psnr, ssim = map(mean, zip(*values, strict=True))
        print(f"mean of {len(originals)}, {name}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    save_png(outputs[-1], grid(shown, 1 + len(rebuilt), captions))
    print(f"All of them side by side: {outputs[-1]}")
    if rates := [one.fps for one in originals if one.fps]:
        moving = moving_sheet(rows)
        save_clip(outputs[-1], shown[-1] if moving is None else moving, rates[0])
        print(f"The same, moving: {' and '.join(str(outputs[-1].with_suffix(ending)) for ending in CLIP_ENDINGS)}")


def frame_metrics(made: Tensor, true: Tensor) -> tuple[list[float], list[float]]:
    """PSNR in dB and SSIM of each frame of a clip (T, 3, H, W), or of a picture (3, H, W)."""
    pairs = (one if one.ndim == 4 else one[None] for one in (made, true))
    psnr, ssim = (values.cpu().tolist() for values in image_metrics(*pairs).values())
    return psnr, ssim


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    run_script(main)
