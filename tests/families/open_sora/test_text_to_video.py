"""Videos of a small network: their files, sizes and lengths, given frames, and long ones clip by clip."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from families.common.pictures import to_pictures
from families.common.weight_files import FAMILY_KEY
from families.open_sora import long_videos
from families.open_sora.autoencoder import autoencoder
from families.open_sora.config import OpenSoraSettings
from inference.text_to_video import main
from tests.families.open_sora.tiny import random_network
from warpcore.clips import encode_mp4
from warpcore.config import ConfigError
from warpcore.data.video_headers import read_header
from warpcore.data.videos import decode
from warpcore.errors import UserError
from warpcore.pictures import read_metadata

pytestmark = pytest.mark.integration
SIDE = 32
PICTURE = Path(__file__).parents[3] / "benchmarks" / "pictures" / "quickstart_video.png"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "network.safetensors"
    save_file(random_network().state_dict(), path, {FAMILY_KEY: "open_sora"})
    return path


@pytest.fixture
def drawn(small_mini, weights, tmp_path, monkeypatch):
    """Draws with arguments; gives the files that were written, by name."""

    def drawn(*arguments: str, folder: str = "videos") -> dict[str, Path]:
        fixed = [f"generator_checkpoint_path={weights}", "model_version=mini", "text_encoder_precision=float32",
                 "steps=2", "device=cpu", f"output_path={tmp_path / folder}"]  # fmt: skip
        if not any("image_size" in one or "resolution" in one for one in arguments):
            fixed.append(f"image_size={SIDE}")
        monkeypatch.setattr("sys.argv", ["text_to_video.py", *fixed, *arguments])
        main()
        return {path.name: path for path in sorted((tmp_path / folder).iterdir())}

    return drawn


@pytest.fixture
def seen(monkeypatch) -> list[np.ndarray]:
    """The videos that are drawn, before they are files."""
    found = []
    before = long_videos.VideoNetworks.draw_videos

    def draw_videos(self, videos, plan, finished, group=None):
        def kept(number, video):
            found.append(video)
            finished(number, video)

        before(self, videos, plan, kept)

    monkeypatch.setattr(long_videos.VideoNetworks, "draw_videos", draw_videos)
    return found


def header_of(path: Path):
    with path.open("rb") as file:
        return read_header(file)


def test_videos_have_their_length_size_and_rate(drawn, seen, capsys):
    files = drawn("--prompts", "a red box", "--prompts", "a star", "--num-frames", "17", "--fps", "12",
                  "--resolution", "144p", "--aspect-ratio", "9:16", "--steps", "1", "--guidance", "1")  # fmt: skip
    assert [*files] == ["0000_a_red_box_0.mp4", "0001_a_star_0.mp4", "grid.png"]
    header = header_of(files["0001_a_star_0.mp4"])
    assert (header.num_frames, header.height, header.width, header.fps) == (17, 144, 256, 12)
    pixels = decode(files["0001_a_star_0.mp4"].read_bytes(), range(17), (144, 256)).pixels
    lost, other = (np.abs(pixels.astype(int) - video).mean() for video in seen[::-1])
    assert lost < min(12, 0.9 * other)
    about = read_metadata(files["grid.png"])
    assert about["prompts"] == "a red box\na star"
    assert json.loads(about["settings"])["num_frames"] == 17
    assert "2 videos, and frames of all of them together: " in capsys.readouterr().out


def test_one_frame_is_a_picture(drawn):
    files = drawn("num_frames=1", "prompts=a box", "image_size=[32, 48]", "seeds=[3, 4]", "sample_name=still")
    assert [*files] == ["grid.png", "still_0000-0.png", "still_0000-1.png"]
    assert Image.open(files["still_0000-1.png"]).size == (48, 32)
    about = read_metadata(files["still_0000-1.png"])
    assert (about["prompt"], about["seed"]) == ("a box", "4")


def test_lengths_have_names_and_default_sizes_are_those_of_the_weights(drawn):
    files = drawn("num_frames=2s", "prompts=a box", "save_fps=3", "steps=1", "sample_name=long")
    header = header_of(files["long_0000.mp4"])
    assert (header.num_frames, round(header.fps, 3)) == (51, 3)


def test_a_seed_gives_the_same_video_whatever_is_drawn_beside_it(drawn, seen, tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(np.full((SIDE, SIDE, 3), 90, np.uint8)).save(picture)
    given = json.dumps({"reference_path": str(picture), "mask_strategy": "0"})
    drawn("num_frames=17", "prompts=a box", "--prompts", f"a star{given}", "seeds=[3, 4]", "batch_size=3")
    drawn("num_frames=17", "prompts=a box", "seeds=[4]", folder="alone")
    first, other, *_, alone = seen
    assert np.abs(alone.astype(int) - other).max() <= 1
    assert np.abs(alone.astype(int) - first).max() > 5


def test_given_frames_are_as_good_as_the_autoencoder_s_own(drawn, seen, tmp_path):
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (34, SIDE // 8, SIDE // 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(clip, 8, crf=0))
    read = decode((tmp_path / "clip.mp4").read_bytes(), range(34), (SIDE, SIDE)).pixels
    network = autoencoder(OpenSoraSettings(model_version="mini"))
    moments = network.clip_moments(torch.from_numpy(read).permute(0, 3, 1, 2)[None], None)
    own = to_pictures(network.decoded_clips(network.scale.latents(moments, None), 34)[0])
    drawn("num_frames=34", "prompts=a box", f"reference_path={tmp_path / 'clip.mp4'}", "mask_strategy=0,0,-5,0,5")
    drawn("num_frames=34", "prompts=a box", f"reference_path={tmp_path / 'clip.mp4'}", "mask_strategy=0,0,0,-5,5",
          folder="before")  # fmt: skip
    forwards, backwards = seen
    assert np.abs(forwards[:17].astype(int) - own[17:]).max() <= 1
    assert np.abs(backwards[17:].astype(int) - own[:17]).max() <= 1


def test_long_videos_go_on_from_the_end_of_each_clip(drawn, seen, monkeypatch):
    told, before = [], long_videos.draw_clips

    def draw_clips(*arguments, given_frames, **others):
        latents = before(*arguments, given_frames=given_frames, **others)
        told.append((given_frames, latents, arguments[-1]))
        return latents

    monkeypatch.setattr(long_videos, "draw_clips", draw_clips)
    files = drawn("num_frames=34", "loop=3", "condition_frame_length=5", "prompts=|0|a box|2|a star", "seeds=[7]")
    assert header_of(files["0000_0_a_box_2_a_star_7.mp4"]).num_frames == 3 * 34 - 2 * 17
    (video,) = seen
    assert len(video) == 68
    network = autoencoder(OpenSoraSettings(model_version="mini"))
    assert told[0][0] is None
    for loop in (1, 2):
        end = torch.from_numpy(video[: 34 + 17 * (loop - 1)][-17:].copy()).permute(0, 3, 1, 2)
        own = network.scale.latents(network.clip_moments(end[None], None), None)
        (latents, shares), drawn_latents, _ = told[loop]
        assert shares.tolist() == [[0.0] * 5 + [1.0] * 5]
        torch.testing.assert_close(latents[:, :, :5], own, rtol=0, atol=1e-4)
        torch.testing.assert_close(drawn_latents[:, :, :5], own, rtol=0, atol=1e-4)
    assert len({tuple(seeds) for *_, seeds in told}) == 3  # each clip has noise of its own


def test_a_drawing_that_was_stopped_goes_on_with_what_is_missing(drawn, seen, tmp_path, monkeypatch):
    arguments = ["num_frames=17", "prompts=a box", "--prompts", "a star", "seeds=[3, 4]", "steps=1"]
    expected = {name: path.read_bytes() for name, path in drawn(*arguments, folder="whole").items()}
    begun, replace = [], os.replace

    def stopped(partial, whole):
        begun.append(whole)
        if len(begun) == 2:  # as a kill does while the second file is written
            Path(partial).write_bytes(Path(partial).read_bytes()[:100])
            raise KeyboardInterrupt
        replace(partial, whole)

    with monkeypatch.context() as patch:
        patch.setattr("warpcore.files.os.replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            drawn(*arguments)
    (first,) = (tmp_path / "videos").glob("*.mp4")
    written, number = first.stat().st_mtime_ns, len(seen)
    with pytest.raises(UserError, match=r"is there already: give another output_path, or write .* skip_existing=true"):
        drawn(*arguments)
    found = drawn(*arguments, "skip_existing=true")
    assert len(seen) - number == 3
    assert first.stat().st_mtime_ns == written
    assert found.keys() == expected.keys()  # and nothing of a file that was begun
    assert all(found[name].read_bytes() == content for name, content in expected.items() if name != "grid.png")
    sheets = [np.asarray(Image.open(folder / "grid.png")).astype(int) for folder in (tmp_path / "whole", first.parent)]
    assert np.abs(sheets[0] - sheets[1]).mean() < 2  # of a video that was there, it shows what the file has
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"skip_existing: .*{first.name} is there already, but .*; delete it"):
        drawn(*arguments, "skip_existing=true")
    with pytest.raises(ConfigError, match="skip_existing keeps the videos that are there"):
        drawn(*arguments, "skip_existing=true", "overwrite=true")


@pytest.mark.parametrize("frames", [1, 17])
def test_what_is_there_and_was_drawn_otherwise_is_told(drawn, seen, frames, capsys):
    arguments = [f"num_frames={frames}", "sample_name=clip", "skip_existing=true", "steps=1"]
    box = f"prompts=a box of hf_{30 * 'x'}"  # what has the form of a token is left out of files
    drawn(*arguments, box, "--prompts", "a star, [left]")
    drawn(*arguments, box, "--prompts", "a star, [left]")
    assert "drawn with other settings" not in capsys.readouterr().out
    number = len(seen)
    drawn(*arguments, box, "--prompts", "a ring", "guidance=3")
    told = capsys.readouterr().out
    ending = "png" if frames == 1 else "mp4"
    assert f"2 of these were drawn with other settings, and stay as they are: clip_0000.{ending} with another" in told
    assert "with another guidance; to draw all of them again" in told
    drawn(*arguments, "prompts=a lamp", "--prompts", "a star, [left]")
    assert (
        f"1 of these were drawn with other settings, and stay as they are: clip_0000.{ending} with another prompt;"
        in (capsys.readouterr().out)
    )
    assert len(seen) == number, "nothing was drawn"


def test_a_damaged_picture_that_is_there_is_named_with_what_to_do(drawn, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "0000_a_box_3.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"skip_existing: .*a_box_3\.png is there already, but .*; delete it"):
        drawn("num_frames=1", "prompts=a box", "seeds=[3]", "skip_existing=true")


def test_texts_hold_from_their_loop_on(drawn, seen):
    arguments = ["num_frames=34", "loop=2", "guidance=1"]
    for number, prompt in enumerate(["|0|a red box|1|a star", "a red box"]):
        drawn(*arguments, f"prompts={prompt}", folder=f"of_{number}")
    changes, stays = seen
    assert np.abs(changes[:34].astype(int) - stays[:34]).max() <= 1
    assert np.abs(changes[34:].astype(int) - stays[34:]).max() > 1


def test_scores_and_cleaning_change_what_t5_reads(drawn, monkeypatch):
    read, before = [], long_videos.VideoNetworks.read
    monkeypatch.setattr(
        long_videos.VideoNetworks, "read", lambda self, texts: read.append(texts) or before(self, texts)
    )
    files = drawn("num_frames=1", "prompts=A Box!", "aes=6.5", "flow=2", "camera_motion=pan left")
    assert read == [["a box! aesthetic score: 6.5. motion score: 2.0. camera motion: pan left."]]
    assert "0000_a_box_0.png" in files
    drawn("num_frames=1", "prompts=A Box!", "clean_prompts=false", "negative_prompt=Dark", folder="raw")
    assert read[1] == ["A Box!", "Dark"]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["prompts=a{0"], UserError, r"prompt 'a\{0': JSON at its end begins with \{ and has no \}"),
        (["prompts=a", "reference_path=none.png", "mask_strategy=0"], UserError, r"none\.png does not exist"),
        (["prompts=a", "reference_path=none.png", "mask_strategy=0,x"], UserError, "'0,x': reference is 'x'"),
        (["prompts=a", "mask_strategy=0"], UserError, "prompt 'a': mask_strategy: reference 0 of 0"),
        (["prompts=a b", "mask_strategy=0;0,0,0,-99", f"reference_path={PICTURE}", "num_frames=34"], UserError,
         "prompt 'a b': mask_strategy: frame -99 of the clip, which has 10 latent frames: write one from -10 to 9"),
        (["prompts=|0|a|3|b", "loop=2", "num_frames=34"], UserError, r"loop 3 of 2; give loop=4"),
        (["prompts=a", "loop=2", "num_frames=17"], UserError, "5 latent frames are 17 frames"),
        (["prompts=a", "loop=2", "condition_frame_length=7"], UserError, r"_length: 7; .* multiple of 5"),
        (["prompts=a", "image_size=4"], UserError, "image_size: 4 x 4 px; sides have at least 8 px"),
        (["prompts=a", "resolution=500p"], ConfigError, "resolution: '500p' has no sizes"),
        (["prompts=a", "image_size=32", "resolution=240p"], ConfigError, "both say the size of the frames"),
        (["prompts=a", "num_frames=3s"], ConfigError, "num_frames: .*'3s' is no length; write a number"),
        (["prompts=a", "num_frames=17", "save_fps=1e12"], ConfigError, "save_fps: .*less than or equal to 1000"),
        (["prompts=a", "sample_name=" + 51 * "\u732b"], ConfigError, "sample_name: "),
        (["prompts=a", "sampler=heun"], ConfigError, "sampler"),
        (["prompts=a", "model_version=XL/2"], ConfigError, "model_version: XL/2, but .* is an STDiT3 of mini: remove"),
        ([], ConfigError, "nothing to draw: give prompts or prompt_file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_before_anything_is_drawn(drawn, arguments, kind, message, monkeypatch):
    monkeypatch.setattr(long_videos.VideoNetworks, "draw_videos", lambda *_: pytest.fail("it began to draw"))
    with pytest.raises(kind, match=message):
        drawn(*arguments)
