"""References are read as clips of the size, and come as latents to where a strategy says."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, features
from torch import Tensor

from families.common.mask_strategies import parse_mask_strategy
from families.open_sora.references import check_placements, given_frames, read_reference
from tests.golden import load_case, resolve
from warpcore.clips import encode_mp4
from warpcore.errors import UserError


def read(path, size=(32, 48), max_bytes=10**6) -> Tensor:
    return read_reference(str(path), size, max_bytes, 5)


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:, 32:] = (250, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def video(tmp_path):
    """Of 24 frames of 64 x 64 px that get brighter."""
    clip = np.stack([np.full((64, 64, 3), 10 * number, np.uint8) for number in range(24)])
    (tmp_path / "video.bin").write_bytes(encode_mp4(clip, 8))  # its content says what it is
    return tmp_path / "video.bin"


def test_pictures_are_clips_of_one_frame_scaled_and_cut_to_the_size(picture):
    found = read(picture)
    assert (found.shape, found.dtype) == ((1, 3, 32, 48), torch.uint8)
    assert found[0, :, 16, 4].tolist() == [0, 0, 0]
    assert found[0, :, 16, 44].tolist() == [250, 10, 10]  # the middle of 48 x 48 px


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animated_pictures_are_refused(tmp_path, ending):
    frames = [Image.fromarray(np.full((16, 16, 3), 60 * number, np.uint8)) for number in range(3)]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with pytest.raises(
        UserError, match=rf"reference_path: .*a\.{ending} is an animated picture of 3 frames: make a vid"
    ):
        read(tmp_path / f"a.{ending}")
    frames[0].save(tmp_path / f"one.{ending}")
    assert read(tmp_path / f"one.{ending}").shape == (1, 3, 32, 48)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_a_picture(picture):
    other = picture.with_suffix(".avif")
    Image.open(picture).save(other, quality=95)
    assert (read(other).float() - read(picture).float()).abs().mean() < 5


def test_videos_are_read_whole(video):
    found = read(video)
    assert (found.shape, found.dtype) == ((24, 3, 32, 48), torch.uint8)
    levels = found.float().mean(dim=(1, 2, 3))
    assert (levels - 10 * torch.arange(24)).abs().max() < 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.png", r"reference_path: .*missing\.png does not exist"),
        ("~nobody_of_this_name/a.png", r"reference_path: ~nobody_of_this_name/a\.png does not exist"),
        (".", r"reference_path: .* is a folder"),
        ("ftp://a/b.png", "reference_path: ftp://a/b.png: nothing is fetched from ftp://; write"),
        ("text.txt", r"text\.txt is no video, and cannot be read as a picture: "),
        ("cut.mp4", r"cut\.mp4 cannot be read as a video: "),
        ("large.png", r"large\.png has more than 1\.0 MB"),
        ("empty", r"empty is no video, and cannot be read as a picture"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, video, name, message):
    (tmp_path / "text.txt").write_text("a picture", encoding="utf-8")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:-300])
    (tmp_path / "large.png").write_bytes(b"\x89PNG" + bytes(10**6))
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match=message) as caught:
        read(name if name.startswith(("~", "ftp:")) else tmp_path / name)
    assert "\n" not in str(caught.value)


def test_videos_that_are_too_long_are_refused(tmp_path):
    path = tmp_path / "long.mp4"
    path.write_bytes(encode_mp4(np.zeros((1001, 16, 16, 3), np.uint8), 24))
    with pytest.raises(UserError, match=r"long\.mp4 has 1001 frames; at most 1000 are read: cut it"):
        read(path)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("2", r"mask_strategy: loop 2 of 2; they count from 0"),
        ("0", r"reference_path: mask_strategy says nothing of reference 1, counted from 0: write where"),
        ("0;0,1,3", "frame 3 of reference 1, which has 3 latent frames"),
        ("0;0,1;1,2", "mask_strategy: reference 2 of 2"),
        ("0;0,1;1,0,0,9", "frame 9 of the clip, which has 5 latent frames"),
    ],
)
def test_placements_are_checked_before_anything_is_drawn(strategy, message):
    check_placements(parse_mask_strategy("0;0,1;1,1,-1,-1"), [1, 3], 5, 2, 1)
    with pytest.raises(UserError, match=message):
        check_placements(parse_mask_strategy(strategy), [1, 3], 5, 2, 1)


GOLDEN, TENSORS = load_case("opensora/mask_strategies")


@pytest.mark.parametrize("call", [call for call in GOLDEN["calls"] if call["kwargs"]["align"] == 5],
                         ids=lambda call: call["name"])  # fmt: skip
def test_with_windows_latents_of_references_are_placed_as_the_reference_does(call):
    given, expected = (resolve(call[key], TENSORS) for key in ("kwargs", "result"))
    for i, (noise, references) in enumerate(zip(given["z"], given["references"], strict=True)):
        placements = parse_mask_strategy(given["mask_strategy"][i])
        clips = [torch.tensor([number]) for number in range(len(references))]
        found, shares = given_frames(
            noise, clips, placements, lambda clip, of=references: of[clip.item()], given["loop"], 5
        )
        assert torch.equal(found, expected["z"][i])
        torch.testing.assert_close(shares, expected["mask"][i])


class Causal:
    """Encodes as an autoencoder does whose first latent is of one frame and each further of four: says of which."""

    def __call__(self, clip: Tensor) -> Tensor:
        numbers = clip[:, 0, 0, 0].float()
        assert (len(numbers) - 1) % 4 == 0
        lasts, firsts = numbers[::4], torch.cat([numbers[:1], numbers[1::4]])
        return torch.stack([firsts, lasts])[:, :, None, None]  # channels: the first and the last frame of a latent


@pytest.mark.parametrize(
    ("frames", "strategy", "found"),
    [
        (17, "0", [(0, 0), None, None, None, None]),
        (1, "0,0,0,-1,1", [None, None, None, None, (0, 0)]),  # a picture, held for four frames
        (17, "0,0,-2,0,2", [(12, 12), (13, 16), None, None, None]),  # goes on from the last five frames
        (20, "0,0,-2,0,2", [(15, 15), (16, 19), None, None, None]),  # also where these end within a latent
        (17, "0,0,0,-2,2", [None, None, None, (0, 0), (1, 4)]),  # comes to the first five
        (17, "0,0,1,-2,2", [None, None, None, (1, 4), (5, 8)]),
        (17, "0,0,0,0,9", [(0, 0), (1, 4), (5, 8), (9, 12), (13, 16)]),
    ],
)
def test_without_windows_references_are_encoded_for_their_place(frames, strategy, found):
    clip = torch.arange(frames, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    latents, shares = given_frames(
        torch.full((2, 5, 1, 1), -1.0), [clip], parse_mask_strategy(strategy), Causal(), 0, None
    )
    seen = [tuple(map(int, one)) for one in latents[:, :, 0, 0].T.tolist()]
    assert seen == [(-1, -1) if one is None else one for one in found]
    assert shares.tolist() == [1.0 if one is None else 0.0 for one in found]


@pytest.mark.parametrize(("strategy", "place"), [("0,0,0,-1,1", 4), ("0,0,0,2,1", 2), ("0", 0)])
def test_without_windows_a_picture_stands_still_from_the_beginning_of_its_clip(strategy, place):
    """Shown less of it before its place, an autoencoder gives latents of a duller picture."""
    seen = []

    def encode(clip: Tensor) -> Tensor:
        seen.append(clip)
        return Causal()(clip)

    picture = torch.full((1, 3, 1, 1), 7, dtype=torch.uint8)
    given_frames(torch.zeros(2, 5, 1, 1), [picture], parse_mask_strategy(strategy), encode, 0, None)
    assert [tuple(clip.shape) for clip in seen] == [(1 + 4 * place, 3, 1, 1)]
    assert (seen[0] == 7).all()


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"pipe is a pipe"):
        read(tmp_path / "pipe")
