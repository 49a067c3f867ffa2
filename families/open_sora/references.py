"""Pictures and videos whose frames a clip is drawn around: read, cut to the clip's size, and placed as latents."""

import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from families.common.mask_strategies import Placement, place_references, start_of
from families.common.wan_autoencoder import TIME_COMPRESSION
from families.common.web_files import fetch, is_url
from warpcore.data import images, videos
from warpcore.data.picture_costs import BadPicture
from warpcore.data.video_headers import START_BYTES, BadVideo, container_of, read_header
from warpcore.errors import UserError
from warpcore.files import open_to_read, why_no_file
from warpcore.text import format_bytes, shortened

KEY = "reference_path"
MAX_FRAMES = 1000
"""Of a reference: 40 seconds at 24 frames per second."""
_PICTURES = (b"avif", b"mif1", b"heic")
"""What an MP4 says of itself that holds a picture."""
Encode = Callable[[Tensor], Tensor]
"""Gives the latents (C, t, h, w) of a clip, uint8 (T, 3, H, W)."""


def read_reference(place: str, size: tuple[int, int], max_bytes: int, seconds: float) -> Tensor:
    """The frames of a picture or a video at a path or a URL, uint8 (T, 3, H, W): scaled to cover `size` (H, W), and
    their middle cut out.

    Args:
        max_bytes: of its file. seconds: that fetching it from a URL may take.

    Raises:
        UserError: it is missing, too large, too long, or neither a picture nor a video; the message names it.
    """
    if not is_url(place) and (scheme := re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place)):
        raise UserError(f"{KEY}: {shortened(place)}: nothing is fetched from {scheme[0]}; write a file's path, or an "
                        "address that begins with http:// or https://")  # fmt: skip
    data = (
        fetch(place, KEY, max_bytes, seconds) if is_url(place) else _read(Path(os.path.expanduser(place)), max_bytes)
    )
    where = f"{KEY}: {place}"
    if not _is_video(data):
        return _picture(data, size, where)
    try:
        frames = read_header(io.BytesIO(data)).num_frames
        if frames > MAX_FRAMES:
            raise UserError(f"{where} has {frames} frames; at most {MAX_FRAMES} are read: cut it")
        pixels = videos.decode(data, range(frames), size).pixels
    except BadVideo as error:
        raise UserError(f"{where} cannot be read as a video: {error}") from None
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _is_video(data: bytes) -> bool:
    """Whether the bytes of a file are those of a container of videos; AVIF and HEIC put pictures into one."""
    try:
        return container_of(data[:START_BYTES]) != "mp4" or data[8:12] not in _PICTURES
    except BadVideo:
        return False


def _picture(data: bytes, size: tuple[int, int], where: str) -> Tensor:
    try:
        pixels, frames = images.decode(data, size).pixels, images.num_frames(data)
    except BadPicture as error:
        raise UserError(f"{where} is no video, and cannot be read as a picture: {error}") from None
    if frames > 1:
        raise UserError(
            f"{where} is an animated picture of {frames} frames: make a video (mp4) of it, or take one frame"
        )
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def _read(path: Path, max_bytes: int) -> bytes:
    if problem := why_no_file(path):
        raise UserError(f"{KEY}: {path} {problem}")
    with open_to_read(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(f"{KEY}: {path} has more than {format_bytes(max_bytes)}")
    return data


def check_placements(
    placements: Sequence[Placement], lengths: Sequence[int], latent_frames: int, loops: int, align: int
) -> None:
    """Raise UserError where a placement names a loop, a reference or a frame that there is not, or a reference is not
    placed.

    Args:
        lengths: latent frames of each reference. latent_frames: of a clip. loops: clips of the video.
        align: see `place_references`.
    """
    late = next((one for one in placements if one.loop >= loops), None)
    if late is not None:
        raise UserError(f"mask_strategy: loop {late.loop} of {loops}; they count from 0, and loop says how many")
    unplaced = set(range(len(lengths))) - {one.reference for one in placements}
    if unplaced:
        raise UserError(
            f"{KEY}: mask_strategy says nothing of reference {min(unplaced)}, counted from 0: write where its frames "
            "go, such as 0 (its first one at the beginning)"
        )
    clip, references = torch.zeros(1, latent_frames, 1, 1), [torch.zeros(1, length, 1, 1) for length in lengths]
    for loop in range(loops):
        place_references(clip, references, placements, loop, align)


def given_frames(
    noise: Tensor,
    clips: Sequence[Tensor],
    placements: Sequence[Placement],
    encode: Encode,
    loop: int,
    align: int | None,
) -> tuple[Tensor, Tensor]:
    """Latents (C, T, h, w) of a clip with frames of references, and the share of noise (T,) of each frame; see
    `place_references`.

    Args:
        noise: (C, T, h, w), or anything of its size. clips: references, uint8 (T, 3, H, W).
        align: latent frames of an autoencoder's window, which are independent of others; None where all frames of a
            clip depend on those before. Then references are encoded so that latents lie as in a clip of its own: the
            first is of a single frame, and only the first.
    """
    placements = [one for one in placements if one.loop == loop]
    if align is not None:
        used = {one.reference for one in placements}
        references = [encode(clip) if i in used else noise[:, :0] for i, clip in enumerate(clips)]
        return place_references(noise, references, placements, loop, align)
    parts = [_in_place(clips[one.reference], one, noise.shape[1], encode) for one in placements]
    placements = [
        replace(one, reference=i, reference_start=0, length=parts[i].shape[1]) for i, one in enumerate(placements)
    ]
    return place_references(noise, parts, placements, loop)


def _in_place(clip: Tensor, placement: Placement, latent_frames: int, encode: Encode) -> Tensor:
    """The latents (C, n, h, w) that a placement takes of a clip, uint8 (T, 3, H, W)."""
    step, spare = TIME_COMPRESSION, (len(clip) - 1) % TIME_COMPRESSION
    clip = clip[spare:] if placement.reference_start < 0 else clip[: len(clip) - spare]
    own = 1 + len(clip) // step
    source = start_of(placement.reference_start, own, f"reference {placement.reference}")
    target = start_of(placement.start, latent_frames, "the clip")
    number = min(placement.length, latent_frames - target, own - source)
    last = step * (source + number - 1) + 1
    if target == 0:
        return encode(clip[step * source : last])  # its first latent is of one frame, whichever that was
    if source > 0:
        return encode(clip[:last])[:, source:]
    # Frames that stand still begin the clip: with fewer than are really before them, latents are of a duller picture.
    before = clip[:1].expand(step * target, -1, -1, -1)
    return encode(torch.cat([before, clip[:last]]))[:, target:]
