"""Latte: what its files say, what they are refused for, and the clips that are drawn of them."""

import re
import sys

import av
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from families.common.autoencoders import Autoencoder
from families.common.clips import clip_moments, decoded_clips
from families.common.family import CLASS_TO_IMAGE
from families.dit import build
from families.dit.autoencoder import autoencoder as own_autoencoder
from families.dit.class_to_image import DitClassToImage
from families.dit.config import DitSettings
from families.dit.exports import latte_to_published
from families.dit.files import dit_numbers
from families.dit.inference import LatteInferenceSettings
from families.dit.latte_class_to_image import LatteClassToImage
from families.dit.versions import MINI
from families.registry import family_of, load_task
from inference.class_to_image import main
from inference.reconstruct import main as reconstruct
from modules.dit import frame_positions
from tests.clips import clip
from tests.families.dit.classed import CLASSES, random_network
from tests.golden import load_manifest
from warpcore.clips import encode_mp4
from warpcore.config import make_config
from warpcore.data.videos import decode
from warpcore.errors import ConfigError, UserError
from warpcore.meta import only_shapes

FRAMES = 3
DRAWN = {"steps": 2, "device": "cpu", "guidance": 3.0, "classes": [1, 3]}


@pytest.fixture
def published(small_mini, tmp_path):
    """A file as Latte's is published: the weights beside their average, with tables of positions."""
    average = random_network(num_frames=FRAMES).state_dict()
    plain = {name: tensor + 1 for name, tensor in average.items()}
    torch.save({"model": plain, "ema": average, "epoch": 7}, tmp_path / "Latte.pt")
    return tmp_path / "Latte.pt"


def draw(**given) -> list[torch.Tensor]:
    task = LatteClassToImage(make_config(LatteClassToImage.Config, DRAWN | given))
    return task.draw(task.labels, [7] * len(task.labels)).pictures


def test_the_network_of_the_published_size_has_the_tensors_of_its_file():
    manifest = load_manifest("latte_xl_2_256x256_ucf101", "opensora")
    with only_shapes():
        network = build.dit(LatteInferenceSettings(num_classes=101, num_frames=16), (256, 256))
    found = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert found == {name: tuple(one["shape"]) for name, one in manifest["tensors"].items()}
    assert sum(p.numel() for p in network.parameters()) == manifest["parameter_count"] == 673_799_072


def test_the_published_file_is_known_by_its_tensors_and_its_average_is_drawn_from(published, tmp_path):
    assert family_of(published).name == "latte"
    kind, config = load_task(CLASS_TO_IMAGE, [f"generator_checkpoint_path={published}", "classes=[1]"])
    assert kind is LatteClassToImage
    assert (config.num_frames, config.num_classes, config.model_version) == (FRAMES, CLASSES, "mini")
    network = build.dit(config, (32, 32))
    for name, tensor in torch.load(published, weights_only=True)["ema"].items():
        torch.testing.assert_close(network.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_the_published_form_has_every_tensor_and_draws_the_same_clips(published, tmp_path):
    latte_to_published(published, tmp_path / "out.pt", [])
    written, given = (torch.load(path, weights_only=True)["ema"] for path in (tmp_path / "out.pt", published))
    assert written.keys() == given.keys()
    assert all(torch.equal(tensor, given[name]) for name, tensor in written.items() if "embed" not in name)
    clips = draw(generator_checkpoint_path=published)
    assert [clip.shape for clip in clips] == [(FRAMES, 3, 32, 32)] * 2
    for one, other in zip(clips, draw(generator_checkpoint_path=tmp_path / "out.pt"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("given", ["num_frames=5", "fps=24", "autoencoder_frames=2"])
def test_an_export_refuses_keys_that_change_nothing_of_it(published, tmp_path, given):
    with pytest.raises(ConfigError, match=f"{given.partition('=')[0]}: this script has no use for it"):
        latte_to_published(published, tmp_path / "out.pt", [given])


def test_files_of_open_sora_s_shapes_are_read(published, tmp_path):
    state = torch.load(published, weights_only=True)["ema"]
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"][:, :, None]
    state["pos_embed_spatial"], state["pos_embed_temporal"] = state.pop("pos_embed"), state.pop("temp_embed")
    torch.save(state, tmp_path / "sora.pt")
    assert family_of(tmp_path / "sora.pt").name == "latte"
    torch.save(state | {"pos_embed_temporal": state["pos_embed_temporal"][:, :1]}, tmp_path / "pictures.pt")
    assert family_of(tmp_path / "pictures.pt").name == "dit"
    assert dit_numbers(tmp_path / "sora.pt", "x") == dit_numbers(published, "x")
    for one, other in zip(draw(generator_checkpoint_path=tmp_path / "sora.pt"),
                          draw(generator_checkpoint_path=published), strict=True):  # fmt: skip
        assert torch.equal(one, other)


def test_clips_of_any_length_are_drawn_and_one_frame_is_a_picture(published):
    for frames in (1, 5):
        drawn = draw(generator_checkpoint_path=published, num_frames=frames)
        assert [one.shape for one in drawn] == [(frames, 3, 32, 32)] * 2
    longer = build.dit(make_config(LatteClassToImage.Config, DRAWN | {
        "generator_checkpoint_path": published, "num_frames": 5}), (32, 32))  # fmt: skip
    assert torch.equal(longer.temp_embed, frame_positions(5, longer.hidden_size))


def test_a_seed_gives_the_same_clip_whatever_else_is_drawn(published):
    alone = draw(generator_checkpoint_path=published, classes=[3], batch_size=2)
    torch.testing.assert_close(draw(generator_checkpoint_path=published, batch_size=2)[1], alone[0])


def test_networks_of_pictures_and_of_clips_are_not_taken_for_each_other(published, tmp_path):
    torch.save(random_network().state_dict(), tmp_path / "dit.pt")
    assert family_of(tmp_path / "dit.pt").name == "dit"
    settings = LatteInferenceSettings(
        num_classes=CLASSES, num_frames=FRAMES, generator_checkpoint_path=tmp_path / "dit.pt"
    )
    with pytest.raises(UserError, match=r"dit.pt is a DiT, of pictures: train/train_dit.py trains it"):
        build.dit(settings, (32, 32))
    pictures = DitSettings(model_version="mini", num_classes=CLASSES, generator_checkpoint_path=published)
    with pytest.raises(UserError, match=r"is a Latte, which draws clips: train/train_latte.py trains it"):
        build.dit(pictures, (32, 32))
    with pytest.raises(UserError, match="is a Latte, which draws clips"):
        DitClassToImage(make_config(DitClassToImage.Config, {
            "generator_checkpoint_path": published, "classes": [1], "model_version": "mini"}))  # fmt: skip


def test_a_file_of_a_run_says_its_frames(published, tmp_path):
    about = {"family": "latte", "config": f'{{"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 1, '
             f'"in_channels": 16, "num_classes": {CLASSES}, "input_size": 2, "num_frames": {FRAMES}}}'}  # fmt: skip
    save_file(torch.load(published, weights_only=True)["ema"], tmp_path / "generator.safetensors", about)
    assert family_of(tmp_path / "generator.safetensors").name == "latte"
    assert draw(generator_checkpoint_path=tmp_path / "generator.safetensors")[0].shape == (FRAMES, 3, 32, 32)


def test_frames_go_through_the_autoencoder_one_by_one_whatever_the_number_at_once():
    autoencoder = Autoencoder.load(MINI / "autoencoder.safetensors")
    clips = torch.randint(0, 256, (2, 3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    seen = []
    encode, decode = autoencoder.moments, autoencoder.decode
    autoencoder.moments = lambda frames: seen.append(len(frames)) or encode(frames)
    autoencoder.decode = lambda latents: seen.append(len(latents)) or decode(latents)
    moments = clip_moments(autoencoder, clips, at_once=4)
    assert moments.shape == (2, 32, 3, 2, 2)
    torch.testing.assert_close(moments[1, :, 2], encode(clips[1, 2:])[0], rtol=1e-4, atol=1e-4)
    latents = autoencoder.scale.latents(moments, None)
    made = decoded_clips(autoencoder, latents, at_once=4)
    assert made.shape == (2, 3, 3, 32, 32)
    torch.testing.assert_close(made[0, 1], decode(latents[:1, :, 1])[0], rtol=1e-4, atol=1e-4)
    assert seen == [4, 2, 4, 2]


def test_the_script_writes_clips_and_a_sheet_that_says_what_they_show(published, tmp_path, monkeypatch):
    given = [f"--generator-checkpoint-path={published}", "--classes=[1, 3]", "--steps=2", "--device=cpu", "--fps=4"]
    for frames, written in ((2, ["mp4", "webp"]), (1, ["png"])):
        folder = tmp_path / f"drawn_{frames}"
        monkeypatch.setattr(sys, "argv", ["script", *given, f"--num-frames={frames}", f"--output-path={folder}"])
        main()
        names = [f"{i:04d}_class_{c}_0.{ending}" for i, c in enumerate((1, 3)) for ending in written]
        assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "grid.png"])
        assert Image.open(folder / "grid.png").text["classes"] == "class 1\nclass 3"
    with Image.open(tmp_path / "drawn_2" / "0000_class_1_0.webp") as moving:
        assert (moving.n_frames, moving.size) == (2, (32, 32))
    with av.open(str(tmp_path / "drawn_2" / "0001_class_3_0.mp4")) as video:
        assert len(list(video.decode(video=0))) == 2
        assert video.streams.video[0].average_rate == 4
    monkeypatch.setattr(sys, "argv", ["script", *given, "--num-frames=2", f"--output-path={tmp_path / 'drawn_2'}"])
    with pytest.raises(UserError, match=r"0000_class_1_0\.mp4 is there already"):
        main()


@torch.no_grad()
def test_clips_go_through_the_autoencoder_of_a_run_frame_by_frame(published, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model_version: mini\nclass_getter: [cls, identity]\nnum_frames: 3\n")
    save_file({"x": torch.zeros(1)}, run / "generator.safetensors", {"family": "latte"})
    content = encode_mp4(clip(3, (32, 48), 9), fps=4)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/grün & schnell.mp4").write_bytes(content)
    (tmp_path / "videos/broken.mp4").write_bytes(content[:-200])
    given = ["num_frames=4", "frame_stride=2", "batch_size=3", f"output_path={tmp_path / 'rebuilt'}", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["reconstruct.py", f"run={run}", f"pictures={tmp_path / 'videos'}", *given])
    reconstruct()
    true = torch.from_numpy(decode(content, (0, 2, 4, 6), (32, 48)).pixels).permute(0, 3, 1, 2)
    autoencoder = own_autoencoder(DitSettings(model_version="mini"))
    made = autoencoder.decode(autoencoder.scale.latents(autoencoder.moments(true), None))
    told, errors = capsys.readouterr().out, (made - true / 255).square().mean(dim=(1, 2, 3))
    of_frames = re.search(r"dB of each frame, autoencoder: (.*)", told)[1]
    assert [float(value) for value in of_frames.split()] == pytest.approx((-10 * errors.log10()).tolist(), abs=0.06)
    assert "left out 1\n  1 that cannot be read as a video: " in told
    with av.open(tmp_path / "rebuilt/0000_grün & schnell.mp4") as written:
        assert (written.streams.video[0].average_rate, sum(1 for _ in written.decode(video=0))) == (2, 4)
