"""Pictures through the Wan autoencoder by inference/reconstruct.py, as diffusers' own network takes them."""

import re
from pathlib import Path

import av
import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from inference.reconstruct import main
from tests.clips import clip
from tests.families.cosmos.tiny_pipeline import transformer, write_cosmos, write_published
from tests.golden import load_manifest
from warpcore.clips import encode_mp4
from warpcore.data.videos import decode

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def rebuild(monkeypatch, tmp_path):
    def rebuild(*arguments: str, size: tuple[int, int] = (32, 49)) -> tuple[np.ndarray, np.ndarray]:
        """A picture of `size`, and what becomes of it."""
        picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "photo.png")
        fixed = [f"pictures={tmp_path / 'photo.png'}", f"output_path={tmp_path / 'rebuilt'}", "overwrite=true"]
        monkeypatch.setattr("sys.argv", ["reconstruct.py", *fixed, "device=cpu", *arguments])
        main()
        return picture, np.array(Image.open(tmp_path / "rebuilt" / "0000_photo.png"))

    return rebuild


def published_autoencoder(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its weights in published names, as far as it has them."""
    names = {library: own for own, library in load_manifest("wan_vae", "cosmos")["names_in_diffusers"].items()}
    return {names[name]: tensor for name, tensor in network.state_dict().items()}


@torch.no_grad()
def test_every_place_of_the_autoencoder_rebuilds_alike(rebuild, pipeline, tmp_path):
    picture, by_folder = rebuild(f"autoencoder_checkpoint_path={pipeline / 'vae'}")
    network = diffusers.AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    extended = np.pad(picture, ((0, 0), (0, 7), (0, 0)), mode="edge")
    given = torch.from_numpy(extended).permute(2, 0, 1)[None, :, None] / 127.5 - 1
    made = network.decode(network.encode(given).latent_dist.mode()).sample[:, :, 0]
    expected = ((made / 2 + 0.5).clamp(0, 1) * 255).round().byte()[0, :, :, :49].permute(1, 2, 0).numpy()
    assert np.abs(by_folder.astype(int) - expected).max() <= 1
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(f"model_version: mini\ngenerator_checkpoint_path: {pipeline}\n")
    save_file({"x": torch.zeros(1)}, run / "generator.safetensors", {"family": "cosmos"})
    for source in (f"autoencoder_checkpoint_path={pipeline}", f"run={run}"):
        assert np.array_equal(rebuild(source)[1], by_folder), source


def test_a_published_file_is_known_by_its_names(rebuild, tmp_path, monkeypatch):
    tiny = {"base_dim": 4, "num_res_blocks": 2}
    monkeypatch.setattr("families.cosmos.build.CONSTRUCTOR", tiny)
    torch.manual_seed(0)
    network = diffusers.AutoencoderKLWan(**tiny)
    (tmp_path / "published" / "tokenizer").mkdir(parents=True)
    file = tmp_path / "published" / "tokenizer" / "tokenizer.pth"
    torch.save(published_autoencoder(network), file)
    write_published(tmp_path / "published" / "model.pt", transformer())
    network.save_pretrained(tmp_path / "vae")
    expected = rebuild(f"autoencoder_checkpoint_path={tmp_path / 'vae'}")[1]
    for place in (file, file.parents[1]):
        assert np.array_equal(rebuild(f"autoencoder_checkpoint_path={place}")[1], expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 40)])
def test_a_picture_smaller_than_the_window_of_ssim_is_rebuilt(rebuild, pipeline, size, capsys):
    picture, made = rebuild(f"autoencoder_checkpoint_path={pipeline}", size=size)
    assert made.shape == picture.shape
    assert "SSIM" in capsys.readouterr().out


def test_a_run_of_the_mini_rebuilds_with_the_autoencoder_that_ships(rebuild, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model_version: mini\n")
    save_file({"x": torch.zeros(1)}, run / "generator.safetensors", {"family": "cosmos"})
    picture, made = rebuild(f"run={run}", size=(64, 64))
    assert made.shape == picture.shape


@torch.no_grad()
def test_a_clip_of_any_number_of_frames_is_rebuilt_as_diffusers_does(pipeline, tmp_path, monkeypatch, capsys):
    """Six frames: the last one is repeated until there are 1 + 4 n, and what comes of that is left out."""
    content = encode_mp4(clip(3, (32, 48), 8), fps=4)
    (tmp_path / "moving.mp4").write_bytes(content)
    given = ["num_frames=6", f"pictures={tmp_path}", f"output_path={tmp_path / 'rebuilt'}", "device=cpu"]
    monkeypatch.setattr("sys.argv", ["reconstruct.py", f"autoencoder_checkpoint_path={pipeline / 'vae'}", *given])
    main()
    network = diffusers.AutoencoderKLWan.from_pretrained(pipeline / "vae").eval()
    true = torch.from_numpy(decode(content, range(6), (32, 48)).pixels).permute(3, 0, 1, 2)[None]
    extended = torch.cat([true, *[true[:, :, -1:]] * 3], dim=2) / 127.5 - 1
    made = network.decode(network.encode(extended).latent_dist.mode()).sample[:, :, :6] / 2 + 0.5
    errors = (made.clamp(0, 1) - true / 255).square().mean(dim=(0, 1, 3, 4))
    told = re.search(r"dB of each frame, autoencoder: (.*)", capsys.readouterr().out)[1]
    assert [float(value) for value in told.split()] == pytest.approx((-10 * errors.log10()).tolist(), abs=0.06)
    for name in ("0000_moving", "grid"):
        with av.open(tmp_path / "rebuilt" / f"{name}.mp4") as written:
            assert written.streams.video[0].average_rate == 4
            assert sum(1 for _ in written.decode(video=0)) == 6
    assert (tmp_path / "rebuilt/grid.png").is_file()
