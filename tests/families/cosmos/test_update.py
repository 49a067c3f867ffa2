"""One update is that of the published training written in plain PyTorch, with the networks of the libraries."""

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer

from tests.families.cosmos.tiny_pipeline import write_cosmos
from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from train.train_cosmos import TrainCosmos
from warpcore.config import make_config

pytestmark = pytest.mark.integration
LR, EPS, BETAS, DECAY, ROWS = 0.01, 1e-2, (0.9, 0.99), 0.1, 32
"""`EPS` keeps gradients of rounding size from steps of full size; `ROWS` of the text condition are the mini's."""


class Recorded(TrainCosmos):
    """Keeps what is drawn by chance: crops, dropped captions, noise and noise levels."""

    def encode(self, batch, random):
        self.batch, self.random = batch, random
        return super().encode(batch, random)


def in_plain_pytorch(folder: Path, run: Recorded, reduce: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and weights after an update by the formulas of the published program."""
    network = diffusers.CosmosTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae")
    t5 = T5EncoderModel.from_pretrained(folder, subfolder="text_encoder")
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    random, captions = run.random, list(run.batch.captions)
    with torch.no_grad():
        posterior = vae.encode(run.batch.images[:, :, None] / 127.5 - 1).latent_dist
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean,
                                                                             vae.config.latents_std))  # fmt: skip
        x0 = (posterior.mean - mean) / std
        read = tokenizer(captions, padding="max_length", max_length=ROWS, truncation=True, return_tensors="pt")
        text = t5(read.input_ids, attention_mask=read.attention_mask).last_hidden_state
        text = text * read.attention_mask[..., None]
        text = text * (random.uniform("caption dropout") >= run.config.caption_dropout)[:, None, None]
    sigma = torch.distributions.Normal(0.0, 1.0).icdf(random.uniform("timestep").double()).exp().float()
    t = (sigma / (1 + sigma)).view(-1, 1, 1, 1, 1)
    noise = random.normal("noise", *x0.shape[1:2], *x0.shape[3:])[:, :, None]
    noised = x0 + sigma.view(-1, 1, 1, 1, 1) * noise
    mask = torch.zeros(1, 1, *run.batch.images.shape[2:])
    made = network((1 - t) * noised, t.flatten(), text, padding_mask=mask).sample
    found = (1 - t) * noised - t * made
    squares = (x0 - found) ** 2 * ((1 + sigma) ** 2 / sigma**2).view(-1, 1, 1, 1, 1)
    loss = 10 * (squares.mean() if reduce == "mean" else squares.sum(dim=1).mean())
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in network.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    return loss.item(), norm.item(), network.state_dict()


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_an_update_is_that_of_the_published_training(tmp_path, reduce):
    folder = write_cosmos(tmp_path / "pipeline")
    data = write_shard(tmp_path / "a.tar", 4)
    settings = tiny_settings(
        tmp_path, data, model_version="mini", generator_checkpoint_path=str(folder), loss_reduce=reduce,
        text_encoder_precision="float32", updates=1, save_every=1, sample_steps=1, sample_count=1, lr=LR, eps=EPS,
        betas=BETAS, weight_decay=DECAY, caption_dropout=0.5, image_size=32,
    )  # fmt: skip
    run = Recorded(make_config(Recorded.Config, settings))
    assert run.run() == 0
    loss, norm, weights = in_plain_pytorch(folder, run, reduce)
    (line,) = read_metrics(settings)
    assert line["loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    trained = load_file(tmp_path / "tiny" / "generator.safetensors")
    assert trained.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=2e-5)
