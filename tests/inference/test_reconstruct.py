"""Pictures through the stages that come after Stage C: sizes, figures and refusals."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from families.cascade.sampling import Cascade
from families.common.pictures import read_picture
from inference.reconstruct import main
from warpcore.errors import UserError


@pytest.fixture
def reconstruct(monkeypatch, tmp_path, drawing_cascade, capsys):
    def reconstruct(*arguments: object) -> tuple[dict[str, np.ndarray], str]:
        folder = tmp_path / "rebuilt"
        fixed = ["model_version=mini", "device=cpu", "stage_b_steps=2", f"output_path={folder}", "overwrite=true"]
        monkeypatch.setattr("sys.argv", ["reconstruct.py", *fixed, *map(str, arguments)])
        main()
        return {path.name: np.array(Image.open(path)) for path in folder.glob("*.png")}, capsys.readouterr().out

    return reconstruct


@pytest.fixture
def pictures(tmp_path):
    """A folder with two pictures of 40 x 61 and 32 x 48 px, and a note."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a.png", (40, 61)), ("b.webp", (32, 48))):
        pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, lossless=True)
    (folder / "note.txt").write_text("not a picture")
    return folder


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return -10 * np.log10(np.mean((one / 255 - other / 255) ** 2))


def test_every_picture_keeps_its_size_and_gets_its_figures(reconstruct, pictures):
    files, printed = reconstruct("--pictures", pictures)
    assert files.keys() == {"0000_a.png", "0001_b.png", "grid.png"}
    for name, source in (("0000_a.png", "a.png"), ("0001_b.png", "b.webp")):
        true = np.array(Image.open(pictures / source))
        assert files[name].shape == true.shape
        (line,) = (line for line in printed.splitlines() if source in line)
        assert float(re.search(r"cascade: (\S+) dB", line)[1]) == pytest.approx(psnr(files[name], true), abs=0.1)
        assert "Stage A: " in line
    assert files["grid.png"].shape[1] > 3 * 61
    assert "mean of 2, Stage A: PSNR " in printed
    assert "mean of 2, cascade: PSNR " in printed


def test_a_picture_that_stage_b_does_not_divide_is_extended_and_not_stretched(reconstruct, pictures, monkeypatch):
    seen, encode = [], Cascade.encode
    monkeypatch.setattr(Cascade, "encode", lambda self, found, sizes: seen.extend(found) or encode(self, found, sizes))
    reconstruct("--pictures", pictures / "a.png")
    true = read_picture(pictures / "a.png")
    assert seen[0].shape == (3, 40, 64)
    assert torch.equal(seen[0][:, :, :61], true)
    assert torch.equal(seen[0][:, :, 61:], true[:, :, 60:].expand(3, 40, 3))


def test_stage_a_alone_needs_no_other_network(reconstruct, pictures, tmp_path):
    for name in ("stage_b", "effnet_encoder", "text"):
        (tmp_path / f"{name}.safetensors").unlink()
    files, printed = reconstruct("--pictures", pictures / "b.webp", "stage_a_only=true", "image_size=64")
    assert files["0000_b.png"].shape == (52, 78, 3)  # the area of 64 x 64
    assert "mean of 1, Stage A" in printed
    assert "cascade" not in printed


def test_latents_of_a_higher_compression_are_fewer(reconstruct, pictures):
    (fine, _), (coarse, _) = (reconstruct("--pictures", pictures, f"compression={factor}") for factor in (16, 32))
    assert not np.array_equal(fine["0000_a.png"], coarse["0000_a.png"])


def test_a_mistake_is_named(reconstruct, pictures, tmp_path):
    (tmp_path / "broken.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    for words, *arguments in (
        ("pictures: this key is required",),
        ("nowhere is no file and no folder with some to read", "--pictures", "nowhere"),
        ("broken.png cannot be read as a picture", "--pictures", tmp_path / "broken.png"),
    ):
        with pytest.raises(UserError, match=words):
            reconstruct(*arguments)
    (tmp_path / "stage_b.safetensors").unlink()
    with pytest.raises(UserError, match="no weights of Stage B: give stage_b_checkpoint_path, or write stage_a_only"):
        reconstruct("--pictures", pictures)


def test_hidden_and_broken_pictures_are_left_out_and_counted(reconstruct, pictures):
    (pictures / "._a.png").write_bytes(b"resource fork")
    (pictures / "aa.png").write_bytes((pictures / "a.png").read_bytes()[:100])
    (pictures / "c.HEIC").write_bytes(b"no decoder")
    (pictures / "more").mkdir()
    Image.new("RGB", (32, 32)).save(pictures / "more/d.tif")
    files, printed = reconstruct("--pictures", pictures, "stage_a_only=true")
    assert files.keys() == {"0000_a.png", "0001_b.png", "0002_d.png", "grid.png"}
    assert "left out 3" in printed
    assert "1 hidden (its name begins with a dot): ._a.png" in printed
    assert f"1 that cannot be read as a picture: {pictures / 'aa.png'}" in printed
    assert f"1 of a format that is not read (.heic): convert them to JPEG or PNG: {pictures / 'c.HEIC'}" in printed


def test_earlier_reconstructions_are_not_written_over(reconstruct, pictures, tmp_path):
    (tmp_path / "rebuilt").mkdir()
    (tmp_path / "rebuilt/grid.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"rebuilt/grid\.png is there already: give another output_path, or write ov"):
        reconstruct("--pictures", pictures, "stage_a_only=true", "overwrite=false")
    assert (tmp_path / "rebuilt/grid.png").read_bytes() == b"mine"
    assert len(list((tmp_path / "rebuilt").iterdir())) == 1
