"""Where frames of references go in a drawn clip: the `mask_strategy` of Open-Sora's prompts.

Placements are separated by ";", their numbers by ",": loop, reference, first frame of the reference, first frame of
the clip, number of frames, edit ratio. Numbers that are left out at the end are 0, 0, 0, 0, 1, 0. Frames are those of
latents; negative ones count from the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from warpcore.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Some frames of a reference in a clip."""

    loop: int = 0
    """Of a long video, which is drawn clip by clip."""
    reference: int = 0
    """Which one, from 0."""
    reference_start: int = 0
    start: int = 0
    length: int = 1
    """Fewer where the clip or the reference ends before."""
    edit: float = 0.0
    """0 keeps the frames; above, they are drawn again from this share of noise on; 1 is all of it."""


NUMBERS = [field.name for field in fields(Placement)]
EXAMPLE = "such as 0 (a picture at the beginning) or 0,0,-8,0,8 (go on from the last 8 frames)"


def parse_mask_strategy(text: str) -> list[Placement]:
    """The placements of a strategy; none of an empty one. Raises UserError that shows the placement that is wrong."""
    return [_placement(part, text) for part in text.split(";")] if text.strip() else []


def _placement(part: str, text: str) -> Placement:
    where = f"mask_strategy {text!r}: " + (f"{part!r}" if part.strip() else "a placement is empty")
    numbers = part.split(",")
    if len(numbers) > len(NUMBERS):
        raise UserError(f"{where} has {len(numbers)} numbers; write at most {len(NUMBERS)}: {', '.join(NUMBERS)}")
    found = {}
    for name, number in zip(NUMBERS, numbers, strict=False):
        kind = float if name == "edit" else int
        try:
            found[name] = kind(number)
        except ValueError:
            raise UserError(f"{where}: {name} is {number.strip()!r}; write a number, {EXAMPLE}") from None
    placement = Placement(**found)
    if placement.loop < 0 or placement.reference < 0 or placement.length < 1 or not 0 <= placement.edit <= 1:
        raise UserError(f"{where}: loop and reference count from 0, length from 1, and edit is from 0 to 1")
    return placement


def place_references(
    latents: Tensor, references: Sequence[Tensor], placements: Sequence[Placement], loop: int = 0, align: int = 1
) -> tuple[Tensor, Tensor]:
    """Latents of a clip with frames of references, and the share of noise that each frame is drawn from.

    Args:
        latents: (C, T, H, W), noise. references: latents (C, T_reference, H, W) each.
        placements: of all loops; those of `loop` count.
        align: starts are moved to a multiple of it: the latents of an autoencoder's window belong together.

    Returns (C, T, H, W), and (T,) float32: 0 for frames that are kept, 1 for those that are drawn.

    Raises:
        UserError: a reference is missing or of another size, or a frame is outside of the clip or of its reference.
    """
    latents, shares = latents.clone(), torch.ones(latents.shape[1], device=latents.device)
    for placement in placements:
        if placement.loop != loop:
            continue
        if placement.reference >= len(references):
            raise UserError(
                f"mask_strategy: reference {placement.reference} of {len(references)}; they count from 0, and "
                "reference_path names one after another, separated by ;"
            )
        reference = references[placement.reference]
        if reference.shape[2:] != latents.shape[2:]:
            sizes = [" x ".join(map(str, one.shape[2:])) for one in (reference, latents)]
            raise UserError(
                f"mask_strategy: latents of reference {placement.reference} are {sizes[0]}, not {sizes[1]}"
            )
        source = start_of(placement.reference_start, reference.shape[1], f"reference {placement.reference}", align)
        target = start_of(placement.start, latents.shape[1], "the clip", align)
        length = min(placement.length, latents.shape[1] - target, reference.shape[1] - source)
        latents[:, target : target + length] = reference[:, source : source + length].to(latents)
        shares[target : target + length] = placement.edit
    return latents, shares


def start_of(frame: int, frames: int, what: str, align: int = 1) -> int:
    """The frame from the beginning, at a multiple of `align`: the nearest, and below where both are as near.

    Raises:
        UserError: it is outside of `what`, which has `frames`.
    """
    counted = frame + frames if frame < 0 else frame
    if not 0 <= counted < frames:
        raise UserError(
            f"mask_strategy: frame {frame} of {what}, which has {frames} latent frames: write one from {-frames} to "
            f"{frames - 1}"
        )
    return aligned(counted, frames, align)


def aligned(frame: int, frames: int, align: int) -> int:
    """The multiple of `align` nearest to a frame, of those that whole groups of `frames` begin at."""
    group, rest = divmod(frame, align)
    return align * (group + (rest > align / 2 and group < frames // align - 1))
