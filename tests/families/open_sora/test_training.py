"""Training STDiT3: an update is that of the published formulas, and pictures and clips are told apart."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common.t5 import T5TextEncoder
from families.open_sora.autoencoder import autoencoder
from families.open_sora.config import OpenSoraConfig
from families.open_sora.versions import VERSIONS
from modules.open_sora_vae import SCALE, SHIFT
from modules.stdit3 import STDiT3
from tests.caches import make_cache
from tests.clips import FPS, write_clips
from tests.families.open_sora.tiny import SMALL, random_network, small_settings
from tests.warpcore.runs import read_metrics, write_shard
from train.train_stdit import TrainStdit
from warpcore.config import ConfigError, make_config
from warpcore.diffusion.frame_masks import GIVEN, frame_masks
from warpcore.errors import UserError
from warpcore.random import SampleRandom

pytestmark = pytest.mark.integration
LR, EPS, BETAS = 0.01, 1e-2, (0.9, 0.999)
MASKS = {"image_head": 0.4, "quarter_tail": 0.4}


class Recorded(TrainStdit):
    """Keeps the batches that it sees, what is made of them, and what is drawn by chance."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = []

    def encode(self, batch, random):
        made = super().encode(batch, random)
        self.seen.append((batch, random, made))
        return made


def trained(given: dict) -> Recorded:
    run = Recorded(make_config(Recorded.Config, given))
    assert run.run() == 0
    return run


def drawn(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + (log_variance / 2).exp() * noise


def in_plain_pytorch(weights: Path, run: Recorded) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights after an update by the published formulas."""
    network = STDiT3(**SMALL)
    network.load_state_dict(load_file(weights))
    ((batch, random, _),) = run.seen
    vae, count = autoencoder(run.config).model, len(batch.images)
    with torch.no_grad():
        posteriors = [vae.spatial_vae["module"].encode(clip / 127.5 - 1).latent_dist for clip in batch.images]
        moments = torch.stack([torch.cat([one.mean, one.logvar], 1) for one in posteriors]).transpose(1, 2)
        spatial = 0.18215 * drawn(moments, random.normal("spatial latent", 4, 9, 4, 4))
        temporal = vae.temporal_vae.encode(spatial)
        mean, std = (torch.tensor(one).view(1, 4, 1, 1, 1) for one in (SHIFT, SCALE))
        x0 = (drawn(temporal, random.normal("latent", 4, 3, 4, 4)) - mean) / std
        texts = T5TextEncoder.load(Path(VERSIONS["mini"].text_encoder), length=32)(batch.captions)
    y = torch.zeros(count, 32, 64)
    y[:, : texts.hidden.shape[1]] = texts.hidden
    dropped = random.uniform("caption dropout") < 0.5
    y[dropped] = network.y_embedder.y_embedding
    seen = torch.arange(32) < texts.lengths[:, None]
    t = (0.3 + 1.2 * torch.special.ndtri(random.uniform("timestep").double())).sigmoid()
    r = (32 * 32 / 512**2 * 3) ** 0.5 * 2  # the config's shift
    t = (r * t / (1 + (r - 1) * t)).float()
    noise = random.normal("noise", *x0.shape[1:])
    masks = frame_masks(MASKS, 3, batch.seeds)
    assert not masks.all()
    assert masks.any()
    share = torch.where(masks, t[:, None], 0)[:, None, :, None, None]
    told = {"fps": float(FPS), "height": 32.0, "width": 32.0}
    found = network((1 - share) * x0 + share * noise, 1000 * t, y, mask=seen, x_mask=masks,
                    **{name: torch.full((count,), value) for name, value in told.items()})  # fmt: skip
    wrong = (found[:, :4] - (x0 - noise)).square().mean(dim=(1, 3, 4))
    loss = ((wrong * masks).sum(1) / masks.sum(1)).mean()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=0)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item(), network.state_dict()


def test_an_update_is_that_of_the_published_formulas(small_mini, tmp_path):
    weights = tmp_path / "start.safetensors"
    save_file(random_network().state_dict(), weights)
    given = small_settings(
        tmp_path, write_clips(tmp_path / "a.tar", 4, frames=9), generator_checkpoint_path=str(weights),
        mask_ratios=MASKS, caption_dropout=0.5, logit_mean=0.3, logit_std=1.2, shift=2.0, lr=LR, eps=EPS,
        betas=BETAS, weight_decay=0,
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


def test_pictures_and_clips_learn_together(small_mini, tmp_path):
    pictures = write_shard(tmp_path / "pictures.tar", 6, (32, 32), first=100)
    given = small_settings(tmp_path, write_clips(tmp_path / "a.tar", 6, frames=9), updates=4, save_every=4, seed=1)
    for key in ("num_frames", "batch_size", "image_size"):
        del given[key]
    given |= {"webdataset_path": [given["webdataset_path"], str(pictures)], "micro_batches_per_update": 1}
    given |= {"bucket_config": {"32px": {9: [1.0, 2], 5: [1.0, 2], 1: [1.0, 2]}}, "mask_ratios": {"random": 1.0}}
    told = {}
    for batch, _, (latents, conditions) in trained(given).seen:
        assert latents.shape[2:] == (-(-batch.size[0] // 4), 4, 4)
        told[batch.size[0]] = conditions["fps"].tolist()
        assert conditions["height"].tolist() == conditions["width"].tolist() == [32.0, 32.0]
        assert ("x_mask" in conditions) == (batch.size[0] > 1)
    assert told == {1: [120.0, 120.0], 9: [FPS, FPS]}


@pytest.mark.parametrize("name", GIVEN)
def test_given_frames_are_clean_and_not_learned(name, small_mini, tmp_path, monkeypatch):
    run = Recorded(make_config(OpenSoraConfig, small_settings(tmp_path, "a.tar", mask_ratios={name: 1.0})))
    run.begin(None)
    torch.manual_seed(0)
    frames, seen = 5, {}
    masks = frame_masks(run.config.mask_ratios, frames, [3, 4])
    latents, wrong = torch.randn(2, 4, frames, 2, 2), torch.randn(2, 8, frames, 2, 2)

    def network(x, t, *, target_alone, **conditions):
        seen.update(x=x, **conditions)
        return wrong[:, : x.shape[1]] if target_alone else wrong

    run.networks = {"generator": torch.nn.Identity()}
    monkeypatch.setattr(torch.nn.Identity, "forward", lambda _, *args, **conditions: network(*args, **conditions))
    sizes = {name: torch.full((2,), 32.0) for name in ("height", "width")}
    losses = [run.loss((latents, sizes | {"x_mask": masks}), SampleRandom([3, 4]))]
    kept = ~masks[:, None, :, None, None].expand_as(latents)
    assert torch.equal(seen["x"][kept], latents[kept])
    assert torch.equal(seen["x_mask"], masks)
    wrong[:, :4][kept] = 100.0
    wrong[:, 4:] = -100.0  # no loss learns what published networks predict beyond their target
    losses.append(run.loss((latents, sizes | {"x_mask": masks}), SampleRandom([3, 4])))
    torch.testing.assert_close(losses[0].loss, losses[1].loss)
    assert (name == "identity") == bool(masks.all())


def test_a_cache_holds_moments_of_both_parts(small_mini, tmp_path):
    given = small_settings(tmp_path, write_clips(tmp_path / "data" / "a.tar", 4, frames=9), updates=2, save_every=2)
    cache = make_cache("train_stdit", given, tmp_path / "cache", "--dtype", "float32", "--variants", "2")
    run = trained(given | {"webdataset_path": str(cache)})
    assert all(batch.images is None and latents.shape == (4, 4, 3, 4, 4) for batch, _, (latents, _) in run.seen)


def test_masks_that_there_are_not_are_refused(tmp_path):
    for ratios, told in (({"quarter": 0.1}, "'quarter' is no mask"), ({"random": 1.2}, "random: 1.2"),
                         ({"random": 0.6, "image_head": 0.6}, "add up to 1.2")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"mask_ratios: .*{told}"):
            make_config(OpenSoraConfig, small_settings(tmp_path, "a.tar", mask_ratios=ratios))


def test_networks_that_do_not_fit_are_refused(small_mini, tmp_path):
    data = write_clips(tmp_path / "a.tar", 4, frames=9)
    save_file(random_network(in_channels=16).state_dict(), tmp_path / "other.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "none.safetensors")
    for name, told in (("other", "x_embedder.proj.weight is"), ("none", "holds no STDiT, STDiT2 or STDiT3: ")):
        with pytest.raises(UserError, match=f"generator_checkpoint_path: .*{name}.safetensors .*{told}"):
            trained(small_settings(tmp_path, data, generator_checkpoint_path=str(tmp_path / f"{name}.safetensors")))
