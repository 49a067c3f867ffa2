"""Rebuild pictures with the autoencoders of any family: out of training runs, or published ones.

    python3 inference/reconstruct.py --model_version 3.6B --pictures photos --output_path rebuilt
    python3 inference/reconstruct.py --run runs/mini_b --pictures demo/pictures/000
    python3 inference/reconstruct.py --run runs/mini_vae --pictures demo/pictures/000

What an autoencoder loses, no drawing will have. PSNR (more is better, in dB) and SSIM (1 is equal) say how much that
is. The family follows from the run or the weights that the arguments name; `--help` beside them lists its keys.
"""

import warpcore.openmp
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from families.common.family import RECONSTRUCTION
from families.common.pictures import image_metrics, read_picture, size_of, to_pictures
from families.registry import load_task
from warpcore.data.picture_files import LeftOut, find_pictures
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder
from warpcore.pictures import grid, save_png

TASK = RECONSTRUCTION


def main() -> None:
    kind, config = load_task(TASK, sys.argv[1:])
    folder, left_out = config.output_path or free_folder("reconstructions"), LeftOut()
    found = find_pictures(config.pictures, left_out, without=folder)
    files, pictures = read_pictures(found, config.image_size, config.most_pictures, left_out)
    outputs = [folder / f"{number:04d}_{file.stem}.png" for number, file in enumerate(files)] + [folder / "grid.png"]
    check_new(outputs, "give another output_path, or write overwrite=true", config.overwrite)
    task = kind(config)
    show(outputs, files, pictures, task.rebuild(pictures))
    for note in [*([left_out] if left_out else []), *task.notes()]:
        print(note)


def show(outputs: list[Path], files: list[Path], pictures: list[Tensor], rebuilt: dict[str, list[Tensor]]) -> None:
    """Print how near each picture came, and write it and a sheet with all of them beside the originals."""
    shown, captions, scores = [], [], {name: [] for name in rebuilt}
    width = max(len(str(file)) for file in files)
    for number, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        shown.append(to_pictures(picture[None])[0])
        captions.append(file.name)
        for name, made in rebuilt.items():
            psnr, ssim = (value.item() for value in image_metrics(made[number][None], picture[None]).values())
            scores[name].append((psnr, ssim))
            shown.append(to_pictures(made[number][None])[0])
            captions.append(f"{name}: {psnr:.1f} dB, {ssim:.3f}")
        save_png(outputs[number], shown[-1])
        print(f"{file!s:{width}}  " + "  ".join(captions[-len(rebuilt) :]))
    for name, values in scores.items():
        psnr, ssim = (sum(column) / len(files) for column in zip(*values, strict=True))
        print(f"mean of {len(files)}, {name}: PSNR {psnr:.2f} dB, SSIM {ssim:.4f}")
    save_png(outputs[-1], grid(shown, 1 + len(rebuilt), captions))
    print(f"All of them side by side: {outputs[-1]}")


def read_pictures(
    files: Sequence[Path], side: int | None, most: int, left_out: LeftOut
) -> tuple[list[Path], list[Tensor]]:
    """The first files that hold pictures, `most` at most, and those (3, H, W) in [0, 1].

    Raises:
        UserError: none does.
    """
    pictures: dict[Path, Tensor] = {}
    problem = None
    for file in dict.fromkeys(files):
        if len(pictures) == most:
            break
        try:
            pictures[file] = read_picture(file, wanted_size(file, side))
        except UserError as error:
            left_out.add("that cannot be read as a picture", file)
            problem = problem or error
    if not pictures:
        raise UserError(f"pictures: there is none to rebuild: {problem}") from problem
    return list(pictures), list(pictures.values())


def wanted_size(file: Path, side: int | None) -> tuple[int, int]:
    """(H, W) in pixels: the picture's own, or of its shape with the area of a square of `side`."""
    height, width = size_of(file)
    scale = 1 if side is None else side / (height * width) ** 0.5
    return max(1, round(height * scale)), max(1, round(width * scale))


if __name__ == "__main__":
    run_script(main)
