"""Features of another trainer's files beside the pictures, as a cache that a training reads."""

import importlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from families.common.features import Origin
from families.common.weight_source import _PARTS
from families.stable_diffusion.t5_layers import Projection
from tests.tools.test_cache_reuse import members
from tests.warpcore.data.tars import picture
from tests.warpcore.runs import read_metrics
from tools import build_dataset, cache, feature_import, shard_writer
from tools.cache_features import PIPELINE_PARTS
from warpcore.config import load_config, make_config
from warpcore.errors import UserError
from warpcore.random import stable_hash

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "train_sd.py"
NETWORKS = {
    "autoencoder_checkpoint_path": str(ROOT / "models" / "mini" / "autoencoder.safetensors"),
    "text_encoder_checkpoint_path": str(ROOT / "models" / "mini" / "text_tower.safetensors"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict, Path]:
    """A folder of pictures with caches of the other trainer's kind, settings of a training, and our cache of them."""
    home = tmp_path_factory.mktemp("made")
    for number in range(6):
        (home / "pictures" / "in").mkdir(parents=True, exist_ok=True)
        (home / "pictures" / "in" / f"{number}.b.png").write_bytes(picture(70 + number, 64, "PNG"))
        (home / "pictures" / "in" / f"{number}.b.txt").write_text(f"a red circle {number}")
    settings = {
        "experiment_id": "a", "checkpoint_path": str(home / "runs"), "model_version": "mini", "updates": 2,
        "batch_size": 3, "save_every": 2, "image_size": 64, "num_workers": 0, "device": "cpu", "crop_mode": "center",
        "latent": "mean", "lr": 0.001, "log_every": 1, "seed": 1, "sample_prompts": ["x"], "sample_count": 1,
        "sample_steps": 1, **NETWORKS,
    }  # fmt: skip
    build_dataset.build_dataset(home / "pictures", home / "data")
    config = home / "ours.yaml"
    config.write_text(yaml.safe_dump(settings | {"webdataset_path": str(home / "data")}))
    cache.main([str(SCRIPT), str(config), str(home / "ours"), "--dtype", "float32"])
    contents = members(home / "ours" / "00000.tar")
    for name, content in contents.items():
        key, _, member = name.partition(".")
        values = torch.from_numpy(np.load(io.BytesIO(content))) if member.endswith(".npy") else None
        file = home / "pictures" / key.replace("_", ".")
        if member == "moments.npy":
            save_file({"latent": values.chunk(2)[0].contiguous()}, file.with_name(f"{file.name}.img_other"))
        elif member == "text.npy":
            save_file({"emb": values}, file.with_name(f"{file.name}.txt_other"))
    return home / "pictures", settings, home / "ours"


def imported(folder: Path, settings: dict, out: Path, *options: str, endings=(".img_other", ".txt_other")) -> Path:
    config = out.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(settings))
    given = [str(folder), str(out), *options, "--import", *endings, "--for", str(SCRIPT), str(config)]
    build_dataset.main(given)
    return out


def train(settings: dict, data: Path, run: str) -> tuple[list[float], set[str]]:
    kind, built = importlib.import_module("train.train_sd").TrainSd, set()

    class Watched(kind):
        drawn_with = frozenset()

        def build(self):
            networks = super().build()
            built.update(networks)
            return networks

        def sample(self, held_out):
            return []

    given = settings | {"webdataset_path": str(data), "experiment_id": run}
    assert Watched(make_config(kind.Config, given)).run() == 0
    return [line["loss"] for line in read_metrics(given)], built


def test_a_training_reads_what_another_trainer_cached_as_it_reads_its_own(made, tmp_path, capsys):
    folder, settings, ours = made
    out = imported(folder, settings, tmp_path / "out")
    told = capsys.readouterr().out
    assert "imported moments, text of 6 pictures in 1 tar" in told
    assert "left out 0" in told
    expected, found = members(ours / "00000.tar"), members(out / "00000.tar")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if name.endswith("moments.npy"):
            mean, log_variance = np.split(np.load(io.BytesIO(found[name])), 2)
            np.testing.assert_array_equal(mean, np.split(np.load(io.BytesIO(content)), 2)[0])
            assert (log_variance == -30).all()
        elif not name.endswith("picture.json"):
            assert found[name] == content
    losses, built = train(settings, out, "theirs")
    assert losses == pytest.approx(train(settings, ours, "ours")[0], rel=1e-6)
    assert built == {"generator"}
    content = Path(NETWORKS["autoencoder_checkpoint_path"]).read_bytes()
    other = tmp_path / "other.safetensors"
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"the weights of the autoencoder network are autoencoder.safetensors"):
        train(settings | {"autoencoder_checkpoint_path": str(other)}, out, "other")


def test_an_import_downloads_no_network_that_makes_no_features(made, tmp_path, monkeypatch):
    folder, settings, _ = made
    seen = []

    def watched(*arguments):
        seen.append(_PARTS.get())
        return load_config(*arguments)

    monkeypatch.setattr(feature_import, "load_config", watched)
    imported(folder, settings, tmp_path / "out")
    assert seen == [PIPELINE_PARTS["all"]]


def test_files_that_do_not_say_their_networks_want_them_named(made, tmp_path):
    folder, settings, _ = made
    for key, network in (("autoencoder_checkpoint_path", "autoencoder"), ("text_encoder_checkpoint_path", "text")):
        given = {name: value for name, value in settings.items() if name != key}
        with pytest.raises(UserError, match=rf"do not say which {network} network made them: name it, {key}=FILE"):
            imported(folder, given, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    of_t5 = {"text_model": "t5", "text_encoder_checkpoint_path": str(ROOT / "models" / "mini" / "t5.safetensors")}
    with pytest.raises(UserError, match="which text network made them: name it, text_projection_checkpoint_path=FILE"):
        imported(folder, settings | of_t5, tmp_path / "out")
    with pytest.raises(UserError, match="crop_mode is random, but these features are of centre crops"):
        imported(folder, settings | {"crop_mode": "random"}, tmp_path / "out")


def test_an_import_whose_last_step_was_interrupted_is_a_cache_when_it_is_finished(made, tmp_path, monkeypatch, capsys):
    folder, settings, _ = made

    def interrupted(_):
        raise OSError("interrupted")

    with pytest.raises(SystemExit):
        imported(folder, settings, tmp_path / "out", endings=("in/img_other",))
    assert "expected an ending such as .img_sdvae, found 'in/img_other'" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(shard_writer, "_go_on", interrupted)
        with pytest.raises(OSError, match="interrupted"):
            imported(folder, settings, tmp_path / "out", endings=("img_other", "txt_other"))
    shard_writer.check_free(tmp_path / "out", overwrite=True)
    assert Origin.read(str(tmp_path / "out")).features.keys() == {"moments", "text"}
    assert not (tmp_path / "out" / shard_writer.ASIDE).exists()


def test_states_of_t5_are_filled_up_to_the_length_that_the_config_has(made, tmp_path, capsys):
    shutil.copytree(made[0], folder := tmp_path / "pictures")
    projection = Projection(64, 64, scale=0.5)
    projection.draw("t5_projection")
    projection.save_pretrained(tmp_path / "layers" / "t5_projection")
    settings = made[1] | {
        "text_model": "t5", "text_tokens": 12, "sample_prompts": [],
        "text_encoder_checkpoint_path": str(ROOT / "models" / "mini" / "t5.safetensors"),
        "text_projection_checkpoint_path": str(tmp_path / "layers"),
    }  # fmt: skip
    build_dataset.build_dataset(folder, tmp_path / "data")
    config = tmp_path / "ours.yaml"
    config.write_text(yaml.safe_dump(settings | {"webdataset_path": str(tmp_path / "data")}))
    cache.main([str(SCRIPT), str(config), str(tmp_path / "ours"), "--dtype", "float32"])
    expected = {
        name: np.load(io.BytesIO(content))
        for name, content in members(tmp_path / "ours" / "00000.tar").items()
        if name.endswith("text.npy")
    }
    for name, states in expected.items():  # the other trainer stores no padding
        tokens = int(np.abs(states).sum(axis=1).astype(bool).sum())
        assert 3 < tokens < 12
        file = folder / name.removesuffix(".text.npy").replace("_", ".")
        longer = [states[:tokens], np.zeros((9, 64), np.float32)] if "5_b" in name else [states[:tokens]]
        save_file({"emb": torch.from_numpy(np.concatenate(longer))}, file.with_name(f"{file.name}.txt_t5cache"))
    out = imported(folder, settings, tmp_path / "out", endings=(".img_other", ".txt_t5cache"))
    told = capsys.readouterr().out
    assert "filled up with zeros to the length that the config has: 5 texts" in told
    assert "cut to the length that the config has: 1 text" in told
    found = members(out / "00000.tar")
    for name, states in expected.items():
        np.testing.assert_array_equal(np.load(io.BytesIO(found[name])), states)
    losses, built = train(settings, out, "of t5")
    assert len(losses) == 2
    assert built == {"generator"}
    shorter = settings | {"text_tokens": 11}
    with pytest.raises(UserError, match="text_tokens is 12 in the cache, 11 here"):
        train(shorter, out, "shorter")


def test_a_first_picture_that_lacks_a_feature_is_left_out_alone(made, tmp_path, capsys):
    shutil.copytree(made[0], folder := tmp_path / "pictures")
    first = min((f"in/{number}_b" for number in range(6)), key=stable_hash)
    file = folder / f"{first.replace('_', '.')}.txt_other"
    shutil.copyfile(file.with_suffix(".img_other"), file)
    imported(folder, made[1], tmp_path / "out")
    told = capsys.readouterr().out
    assert "imported moments, text of 5 pictures in 1 tar" in told
    assert f"1 its .txt_other holds moments, as another of its files does: {first.replace('_', '.')}.png" in told


def test_broken_and_foreign_files_are_left_out_by_name(made, tmp_path, capsys):
    shutil.copytree(made[0], folder := tmp_path / "pictures")
    files = [folder / "in" / f"{number}.b.img_other" for number in range(6)]
    files[0].write_bytes(files[0].read_bytes()[:-5])
    strange = files[0].with_name("6.b.png")
    strange.write_bytes(picture(76, 64, "PNG"))
    header = b'{"latent":{"dtype":"F8_E8M0","shape":[1,2,2],"data_offsets":[0,4]}}'  # a dtype that is not read here
    strange.with_suffix(".img_other").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    (folder / "in" / "6.b.txt_other").write_bytes((folder / "in" / "0.b.txt_other").read_bytes())
    save_file({"latent": torch.zeros(16, 3, 4)}, files[1])
    save_file({"weight": torch.zeros(2, 2)}, files[2])
    files[3].unlink()
    save_file({"latent": torch.full((16, 4, 4), torch.inf)}, files[4])
    (folder / "in" / "5.b.txt").unlink()
    text = load_file(folder / "in" / "5.b.txt_other")["emb"]
    save_file({"emb": text[:9].bfloat16()}, folder / "in" / "5.b.txt_other")
    out = imported(folder, made[1], tmp_path / "out")
    told = capsys.readouterr().out
    for line in (
        "imported moments, text of 1 picture in 1 tar", "left out 6",
        "2 its .img_other is no whole safetensors file: in/",
        "1 its .img_other holds 'weight' [2, 2], not 'latent' (C, H, W) or 'emb' (L, D): in/2.b.png",
        "1 no .img_other beside it: in/3.b.png", "1 its moments hold numbers that are not finite: in/4.b.png",
        "  no caption: 1;",
    ):  # fmt: skip
        assert line in told, told
    assert "its moments are of shape [32, 3, 4], where the config wants [32, 4, 4] for 64 x 64 px: in/1.b.png" in told
    assert "filled up with zeros to the length that the config has: 1 text" in told
    (kept,) = (content for name, content in members(out / "00000.tar").items() if name == "in/5_b.text.npy")
    expected = torch.cat([text[:9].bfloat16().float(), torch.zeros_like(text[9:])])
    np.testing.assert_array_equal(np.load(io.BytesIO(kept)), expected)
    assert {name.split(".")[0] for name in members(out / "00000.tar")} == {"in/5_b"}
    shutil.rmtree(out)
    for file in files:
        file.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"holds no picture with .img_other, .txt_other beside it: left out 7"):
        imported(folder, made[1], out)
