"""Training a Latte: an update is that of the plain formulas; caches hold what the frozen network makes of clips."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from families.common.autoencoders import Autoencoder
from families.common.class_training import CLASS
from families.common.features import Origin, stored
from families.registry import family_of
from modules.dit import DiT
from tests.caches import make_cache
from tests.clips import write_clips
from tests.families.dit.classed import CLASSES, SMALL, random_network, small_settings
from tests.families.dit.test_update import bound, mean
from tests.warpcore.runs import read_metrics
from train.train_latte import TrainLatte
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.pictures import read_cells

pytestmark = pytest.mark.integration
LR, EPS, BETAS = 0.01, 1e-2, (0.9, 0.999)
FRAMES = 3


class Recorded(TrainLatte):
    """Keeps the batches that it sees, and what is drawn by chance."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def encode(self, batch, random):
        self.seen.append(batch)
        self.random = random
        return super().encode(batch, random)


def settings(folder: Path, data: Path | str, **changes) -> dict:
    return small_settings(folder, data, num_frames=FRAMES, autoencoder_frames=4) | changes


def trained(given: dict) -> Recorded:
    run = Recorded(make_config(Recorded.Config, given))
    assert run.run() == 0
    return run


def in_plain_pytorch(weights: Path, run: Recorded) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights after an update by the published formulas, frame by frame."""
    network = DiT(2, num_classes=CLASSES, num_frames=FRAMES, **SMALL)
    network.load_state_dict(load_file(weights))
    vae = Autoencoder.load(Path(run.config.version.autoencoder)).model
    (batch,), random = run.seen, run.random
    with torch.no_grad():
        posteriors = [vae.encode(clip / 127.5 - 1).latent_dist for clip in batch.images]
        mean_, std = (torch.stack([getattr(one, name) for one in posteriors], 0).transpose(1, 2) for name in
                      ("mean", "std"))  # fmt: skip
        x0 = (mean_ + std * random.normal("latent", *mean_.shape[1:])) * vae.config.scaling_factor
    labels = torch.where(random.uniform("class dropout") < 0.5, CLASSES, batch.extra[CLASS])
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    t, noise = (random.uniform("timestep") * 1000).long(), random.normal("noise", *x0.shape[1:])
    alphas = (1 - betas).cumprod(0)[t].float().view(-1, 1, 1, 1, 1)
    noised = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
    made, v = network(noised, t, labels).chunk(2, dim=1)
    flat = [one.flatten(2, 3) for one in (x0, noised, made.detach(), v)]  # each frame counts like each place
    loss = mean(F.mse_loss(made, noise, reduction="none")) + bound(*flat, t, betas)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0)
    loss.mean().backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.mean().item(), norm.item(), network.state_dict()


def test_an_update_is_that_of_the_published_formulas(small_mini, tmp_path):
    weights = tmp_path / "start.safetensors"
    save_file(random_network(num_frames=FRAMES).state_dict(), weights)
    given = settings(
        tmp_path, write_clips(tmp_path / "a.tar", 4), generator_checkpoint_path=str(weights), updates=1, save_every=1,
        class_dropout=0.5, lr=LR, eps=EPS, betas=BETAS, weight_decay=0,
    )  # fmt: skip
    run = trained(given)
    loss, norm, expected = in_plain_pytorch(weights, run)
    (line,) = read_metrics(given)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    found = load_file(tmp_path / "runs" / "run" / "generator.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-5)


def test_a_cache_of_clips_trains_as_the_clips_do(small_mini, tmp_path):
    """Of videos of as many frames as a clip has, each use is the same clip."""
    data = write_clips(tmp_path / "data" / "a.tar", 6, frames=FRAMES)
    still = [
        ["seconds", "codec", "constant_rate", "rotation"],
        "lambda s, c, k, r: s < 1 and c == 'h264' and k and r == 0",
    ]
    given = settings(tmp_path, data, updates=3, columns=["flow", "seconds"], dataset_filters=[still])
    expected = trained(given)
    cache = make_cache("train_latte", given, tmp_path / "cache", "--dtype", "float32")
    origin = Origin.read(str(cache))
    assert origin.shapes == {"moments": {f"{FRAMES}x32x32": [32, FRAMES, 2, 2]}}
    apart = given | {"experiment_id": "cached", "webdataset_path": str(cache)}
    found = trained(apart)
    assert [one["loss"] for one in read_metrics(apart)] == pytest.approx([one["loss"] for one in read_metrics(given)])
    for batch, other in zip(found.seen, expected.seen, strict=True):
        assert batch.images is None
        assert batch.keys == other.keys
        assert batch.size == other.size == (FRAMES, 32, 32)
        for name in ("flow", "seconds"):
            assert batch.columns[name].tolist() == other.columns[name].tolist()


def test_variants_of_a_cache_are_other_clips_of_the_same_video(small_mini, tmp_path):
    data = write_clips(tmp_path / "data" / "a.tar", 4, frames=9)
    given = settings(tmp_path, data, updates=12, latent="mean")
    cache = make_cache("train_latte", given, tmp_path / "cache", "--dtype", "float32", "--variants", "3")
    run = trained(given | {"experiment_id": "cached", "webdataset_path": str(cache)})
    drawn = {}
    for batch in run.seen:
        for key, moments in zip(batch.keys, stored(batch, "moments"), strict=True):
            drawn.setdefault(key, set()).add(round(moments.double().sum().item(), 3))
    assert any(len(values) > 1 for values in drawn.values())
    assert all(len(values) <= 3 for values in drawn.values())


def test_a_cache_of_other_frames_is_refused(small_mini, tmp_path):
    given = settings(tmp_path, write_clips(tmp_path / "data" / "a.tar", 4, frames=9))
    cache = make_cache("train_latte", given, tmp_path / "cache")
    for changes, message in (({"frame_stride": 2}, "frame_stride is 1 in the cache, 2 here"),
                             ({"num_frames": 2}, "bucket_sizes.* in the cache")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            trained(given | {"webdataset_path": str(cache)} | changes)


def test_a_cache_draws_shares_once_for_each_row(small_mini, tmp_path, capfd):
    data = write_clips(tmp_path / "data" / "a.tar", 12, frames=5)
    given = settings(tmp_path, data, updates=24, save_every=24, seed=3)
    for key in ("num_frames", "batch_size", "image_size"):
        del given[key]
    given |= {"bucket_config": {"32px": {4: [0.5, 1], 2: [1.0, 1]}, "16px": {2: [0.5, 1]}}}
    given |= {"micro_batches_per_update": 1}
    cache = make_cache("train_latte", given, tmp_path / "cache")
    said = capfd.readouterr().out
    assert "bucket_config are drawn once for each row" in said
    buckets_said = re.search(r"rows per bucket and epoch, on average: (.*)", said)[1]
    run = trained(given | {"experiment_id": "cached", "webdataset_path": str(cache), "seed": 4})
    said = capfd.readouterr().err
    assert "bucket_config are drawn once for each row" in said
    assert f"on average: {buckets_said}" in said
    found = {}
    for batch in run.seen:
        for key, moments in zip(batch.keys, stored(batch, "moments"), strict=True):
            found.setdefault(key, set()).add((batch.size, *moments.shape))
    assert all(len(sizes) == 1 for sizes in found.values())
    sizes = Counter(next(iter(of_key))[0] for of_key in found.values())
    assert sizes.keys() == {(4, 32, 32), (2, 16, 16)}
    left_out = int(re.search(r"(\d+) rejected: kept in no bucket, by the probabilities", said)[1])
    assert sizes.total() + left_out == 12
    assert (
        buckets_said == f"32px x 4 frames: {sizes[4, 32, 32]}, 32px x 2 frames: 0, 16px x 2 frames: {sizes[2, 16, 16]}"
    )


def test_cached_clips_are_decoded_to_look_at(small_mini, tmp_path):
    given = settings(tmp_path, write_clips(tmp_path / "data" / "a.tar", 4))
    cache = make_cache("train_latte", given, tmp_path / "cache")
    make_cache("train_latte", given, cache, "--preview", "3", str(tmp_path / "seen.png"))
    cells = read_cells(tmp_path / "seen.png")
    assert [(cell.height, cell.width) for cell in cells] == [(32, FRAMES * 32)] * 3


def test_lengths_and_pictures_are_mixed_by_buckets(small_mini, tmp_path):
    write_clips(tmp_path / "data" / "a.tar", 6, frames=5)
    write_clips(tmp_path / "data" / "b.tar", 6, first=6, frames=2)
    given = settings(tmp_path, tmp_path / "data", updates=6)
    for key in ("num_frames", "batch_size", "image_size"):
        del given[key]
    given |= {"bucket_config": {"32px": {8: [0.0, None], 4: [1.0, 2], 2: [1.0, 3]}}, "micro_batches_per_update": 2}
    run = trained(given)
    assert {batch.size for batch in run.seen} == {(4, 32, 32), (2, 32, 32)}
    assert {len(batch.keys) for batch in run.seen} == {2, 3}
    weights = load_file(tmp_path / "runs" / "run" / "generator.safetensors")
    assert weights["temp_embed"].shape == (1, 4, SMALL["hidden_size"])
    assert family_of(tmp_path / "runs" / "run").name == "latte"
