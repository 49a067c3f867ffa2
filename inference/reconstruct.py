"""Rebuild pictures: through Stage A alone, and through encoder, Stage B and Stage A, the way a drawn picture comes.

    python3 inference/reconstruct.py --pictures photos --output_path rebuilt
    python3 inference/reconstruct.py --run runs/mini_b --pictures demo/pictures/000

What Stage A loses, no drawing will have; what the whole way loses beside it was not in the encoder's latents. PSNR
(more is better, in dB) and SSIM (1 is equal) say how much that is.
"""

import warpcore.openmp
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from families.cascade.diffusion import latent_size
from families.cascade.inference import DrawingSettings
from families.cascade.pictures import nearness, pad, read_picture, size_of, to_pictures
from families.cascade.sampling import Cascade
from warpcore.config import load_config
from warpcore.data.picture_files import LeftOut, find_pictures
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new, free_folder
from warpcore.pictures import grid, save_png


class ReconstructConfig(DrawingSettings):
    """Keys of this script, beside those of the networks; it needs none of Stage C."""

    unused = frozenset(
        {
            "generator_checkpoint_path",
            "previewer_checkpoint_path",
            "clip_image_model_name",
            "clip_image_checkpoint_path",
            "diffusion_target",
        }
    )

    pictures: list[Path]
    """Files, or folders of files, with their sub-folders."""
    most_pictures: PositiveInt = 64
    """So many of them at most, in the order of their names."""
    output_path: Path | None = None
    """Folder for `grid.png` and the single pictures; by default the first of `reconstructions`, `reconstructions_2`,
    ... that is free."""
    overwrite: bool = False
    """Write over pictures of the same names in `output_path`."""
    image_size: PositiveInt | None = None
    """Scale pictures to the area of a square with this side, in pixels; without it, they keep their size."""
    compression: PositiveFloat | None = None
    """Pixels per position of the encoder's latents; by default what Stage C's have (42.67, mini: 16)."""
    caption: str = ""
    """What Stage B reads beside the latents."""
    seed: int = 0
    """Of Stage B's noise."""
    stage_a_only: bool = False
    """Leave out encoder and Stage B."""

    @model_validator(mode="after")
    def _has_stage_b(self) -> Self:
        if not self.stage_a_only and self.stage_b.generator_checkpoint_path is None:
            raise ValueError("no weights of Stage B: give stage_b_checkpoint_path, or write stage_a_only: true")
        return self


def main() -> None:
    config = load_config(ReconstructConfig)
    folder, left_out = config.output_path or free_folder("reconstructions"), LeftOut()
    found = find_pictures(config.pictures, left_out, without=folder)
    files, pictures = read_pictures(found, config.image_size, config.most_pictures, left_out)
    outputs = [folder / f"{number:04d}_{file.stem}.png" for number, file in enumerate(files)] + [folder / "grid.png"]
    if not config.overwrite:
        check_new(outputs, "give another output_path, or write overwrite=true")
    cascade = Cascade(config)
    rebuilt = {"Stage A": cascade.rebuild(pictures)}
    if not config.stage_a_only:
        rebuilt["cascade"] = rebuild_from_latents(cascade, pictures)
    show(outputs, files, pictures, rebuilt)
    if left_out:
        print(left_out)
    print(cascade.peak_memory())


def rebuild_from_latents(cascade: Cascade, pictures: list[Tensor]) -> list[Tensor]:
    """What encoder, Stage B and Stage A make of pictures (3, H, W) in [0, 1]."""
    config, sizes = cascade.settings, [tuple(picture.shape[1:]) for picture in pictures]
    compression = config.compression or config.version.compression
    whole = [pad(picture, cascade.picture_factor) for picture in pictures]
    latents = cascade.encode(whole, [latent_size(*picture.shape[1:], compression) for picture in whole])
    caption, nothing = cascade.read([config.caption, ""])["clip_text_pooled"].split(1)
    return cascade.decode(cascade.draw_b(latents, caption, nothing, sizes, [config.seed] * len(sizes)), sizes)


def show(outputs: list[Path], files: list[Path], pictures: list[Tensor], rebuilt: dict[str, list[Tensor]]) -> None:
    """Print how near each picture came, and write it and a sheet with all of them beside the originals."""
    shown, captions, scores = [], [], {name: [] for name in rebuilt}
    width = max(len(str(file)) for file in files)
    for number, (file, picture) in enumerate(zip(files, pictures, strict=True)):
        shown.append(to_pictures(picture[None])[0])
        captions.append(file.name)
        for name, made in rebuilt.items():
            psnr, ssim = (value.item() for value in nearness(made[number][None], picture[None]).values())
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
