"""Training a ControlNet: what is trained and kept, where its filter runs, and what it refuses."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from families.cascade import versions
from families.cascade.config import ModelSettings
from families.cascade.controlnet import load_controlnet
from tests.golden import load_case, weights_of
from tests.many_processes import launch_processes
from tests.warpcore.runs import load_weights, read_metrics
from train.train_c_controlnet import TrainControlNet
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(small_cascade):
    return small_cascade | {
        "controlnet_blocks": [1, 4], "controlnet_filter": "CannyFilter", "controlnet_filter_params": {"resize": None},
        "log_every": 1, "save_every": 100, "sample_steps": 2, "lr": 0.01,
    }  # fmt: skip


def train(settings: dict, kind: type[TrainControlNet] = TrainControlNet) -> list[dict]:
    assert kind(make_config(kind.Config, settings)).run() == 0
    return read_metrics(settings)


def test_only_the_adapter_is_trained_kept_and_published(settings):
    seen = {}

    class Watched(TrainControlNet):
        def close(self):
            seen["optimized"] = set(self.parameters)
            seen["dtypes"] = {name: next(n.parameters()).dtype for name, n in self.networks.items()}
            seen["generator"] = {k: v.clone() for k, v in self.networks["generator"].state_dict().items()}
            seen["stored"] = self.checkpoints.stored(self.update)
            super().close()

    lines = train(settings | {"updates": 8, "dtype": "bfloat16"}, Watched)
    assert lines[-1]["grad_norm"] > 0
    assert seen["dtypes"]["generator"] == torch.bfloat16
    assert seen["dtypes"]["controlnet"] == torch.float32
    spec, tensors = load_case("stage_c_small")
    for name, weight in weights_of(spec, tensors).items():
        assert torch.equal(seen["generator"][name], weight.bfloat16()), name
    kept = {name.split("/")[1].split(".")[0] for name in seen["stored"] if name.startswith(("network/", "optimizer/"))}
    assert kept == {"controlnet"} == {name.split(".")[0] for name in seen["optimized"]}
    network, made = load_controlnet(
        Path(settings["checkpoint_path"]) / "c" / "controlnet.safetensors", ModelSettings(model_version="mini")
    )
    assert made.resize is None
    published = load_weights(settings, "controlnet")
    assert all(torch.equal(tensor, published[name]) for name, tensor in network.state_dict().items())
    assert all(projection[-1].weight.abs().max() > 0 for projection in network.projections)


@pytest.mark.bits
def test_the_grid_shows_pictures_conditions_and_both_drawings(settings):
    rows = []

    class Watched(TrainControlNet):
        def sample(self, held_out):
            rows.append(super().sample(held_out))
            return rows[-1]

    train(settings | {"updates": 2, "save_every": 1, "validation_samples": 2, "sample_count": 2}, Watched)
    (first, _), (second, _) = rows[0], rows[1]
    assert list(first.pictures) == ["picture", "condition", "without", "sample"]
    assert {picture.shape for picture in first.pictures.values()} == {(64, 64, 3)}
    assert set(np.unique(first.pictures["condition"])) == {0, 255}
    assert np.array_equal(first.pictures["without"], second.pictures["without"])
    assert not np.array_equal(second.pictures["without"], second.pictures["sample"])


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_workers": 1}, "ms/CannyFilter (workers)"),
        ({}, "ms/CannyFilter (main process)"),
        (
            {
                "controlnet_filter": "SREffnetFilter",
                "controlnet_filter_params": {},
                "controlnet_bottleneck_mode": "simple",
            },
            "ms/SREffnetFilter (cpu)",
        ),
    ],
)
def test_where_a_filter_runs_and_how_long_is_reported(settings, changes, key, capfd):
    lines = train(settings | changes)
    assert [name for name in lines[0] if name.startswith("ms/")] == [key]
    assert lines[0][key] > 0
    assert f"{key.removeprefix('ms/')} {lines[0][key]:.1f} ms" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("use_fsdp", [False, True])
def test_two_processes_make_twenty_updates_of_one(settings, use_fsdp):
    alone = settings | {"experiment_id": "alone", "updates": 20, "micro_batch_size": 2}
    expected = train(alone)
    together = alone | {"experiment_id": "together", "use_fsdp": use_fsdp}
    launch_processes(2, _member, together, versions.VERSIONS["mini"])
    lines = read_metrics(together)
    assert len(lines) == 20
    for line, other in zip(expected, lines, strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-3


def _member(settings: dict, mini: versions.Version) -> None:
    versions.VERSIONS["mini"] = mini
    assert TrainControlNet(make_config(TrainControlNet.Config, settings)).run() == 0


@pytest.mark.slow
@pytest.mark.bits
def test_less_memory_is_the_same_update(settings):
    lines = [train(settings | {"experiment_id": f"level{n}", "activation_checkpointing": n})[0] for n in (0, 3)]
    assert lines[0]["loss"] == lines[1]["loss"]
    assert lines[0]["grad_norm"] == pytest.approx(lines[1]["grad_norm"], rel=1e-6)


def with_depth(path: Path, names: list[str]) -> str:
    """A tar of pictures, some with their depth beside them."""
    with tarfile.open(path, "w") as tar:
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            members = {"png": pixels, "txt": b"picture"}
            if names[number % len(names)]:
                members[names[number % len(names)]] = pixels[..., 0]
            for extension, content in members.items():
                file = io.BytesIO(content if isinstance(content, bytes) else b"")
                if not isinstance(content, bytes):
                    Image.fromarray(content).save(file, "PNG")
                info = tarfile.TarInfo(f"{number:03d}.{extension}")
                info.size = len(file.getvalue())
                file.seek(0)
                tar.addfile(info, file)
    return str(path)


def test_a_member_of_the_sample_is_a_condition(settings, tmp_path):
    seen = []

    class Watched(TrainControlNet):
        def encode(self, batch, random):
            latents, conditions, control = super().encode(batch, random)
            seen.append((batch.images, control))
            return latents, conditions, control

    depth = {"controlnet_filter": "DepthFilter", "controlnet_filter_params": None}
    train(settings | depth | {"webdataset_path": with_depth(tmp_path / "d.tar", ["depth.png"])}, Watched)
    images, control = seen[0]
    torch.testing.assert_close(control, images[:, :1] / 255)
    seen.clear()
    some = with_depth(tmp_path / "some.tar", ["depth.png", ""])
    train(settings | depth | {"webdataset_path": some, "batch_size": 3, "experiment_id": "some"}, Watched)
    assert len(seen[0][1]) == 3, "samples without the member are passed over"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"controlnet_blocks": [1, 6]}, r"no block 6; Stage C \(mini\) has 6 convolution blocks, 0 to 5"),
        ({"controlnet_filter": "Cany"}, "write one of CannyFilter"),
        ({"controlnet_filter_params": {"sigma": 1}}, "sigma: unknown key"),
        ({"controlnet_filter": "DepthFilter", "controlnet_filter_params": None}, r"no sample has a \.depth\.png"),
        ({"controlnet_filter": "InpaintFilter", "controlnet_filter_params": None, "image_size": 32,
          "multi_aspect_ratio": [1, 3]}, r"InpaintFilter needs pictures of 32 px or more, but some"),
        ({"generator_checkpoint_path": None}, "give generator_checkpoint_path"),
        ({"controlnet_checkpoint_path": "nowhere.safetensors"}, r"controlnet_checkpoint_path: nowhere\.safetensors"),
        ({"controlnet_bottleneck_mode": "huge"}, "controlnet_bottleneck_mode"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(settings, changes, reason, monkeypatch):
    monkeypatch.setattr(TrainControlNet, "bucket_factor", 16)
    with pytest.raises(UserError, match=reason):
        TrainControlNet(make_config(TrainControlNet.Config, settings | changes)).run()
