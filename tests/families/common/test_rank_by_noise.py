"""`min_rank` in every script of a LoRA: each sample of a batch has the rank of its noise, and resuming is exact."""

import pytest
import torch
from torch import Tensor, nn

from families.common.lora_config import LoraKeys
from families.common.lora_files import notes_of_ranks
from families.common.lora_formats import LoraFileError
from families.common.lora_formats.adapters import with_min_rank
from families.common.lora_training import lora_of
from modules.lora import LoraSettings, adapters, add_adapters
from modules.rank_by_noise import follow_noise
from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, files, settings, train, use_case  # noqa: F401
from tests.warpcore.runs import numbers
from warpcore.config import make_config
from warpcore.errors import ConfigError

LORAS = [name for name in SETTINGS if "min_rank" in use_case(name).Config.model_fields]
FOLLOWING = {
    "adapter": "lora", "dora": False, "factor": -1, "rank": 4, "min_rank": 1, "activation_checkpointing": 3,
    "batch_size": 4, "micro_batch_size": 2,
}  # fmt: skip


def of(name: str, **others) -> dict:
    """Settings of a script that trains adapters of a rank that follows the noise."""
    return {key: value for key, value in (FOLLOWING | others).items() if key in use_case(name).Config.model_fields}


@torch.no_grad()
def compare(network: nn.Module, noised: Tensor, r: Tensor, conditions: dict, turned) -> list[int]:
    """Check that a batch is predicted as each of its samples alone; gives the ranks of the samples."""
    before, random = {name: p.clone() for name, p in network.named_parameters()}, torch.Generator().manual_seed(4)
    for parameter in network.parameters():
        parameter += 0.2 * torch.randn(parameter.shape, generator=random)
    whole = network.eval()(noised, r, **conditions)
    ranks = next(adapter for *_, adapter in adapters(network)).kept.sum(1).tolist()
    for i in range(len(r)):
        row = slice(i, i + 1)
        own = {key: value[row] if isinstance(value, Tensor) and value.shape[:1] == r.shape else value
               for key, value in conditions.items()}  # fmt: skip
        alone = network(noised[row], r[row], **own)
        torch.testing.assert_close(whole[row], alone, rtol=0, atol=5e-4 * float(whole.abs().max()))
    with follow_noise(network, turned):
        others = network(noised, r, **conditions)
    apart = float((whole - others).abs().max() / whole.abs().max())
    assert (apart > 1e-3) is (len(set(ranks)) > 1), apart
    for name, parameter in network.train().named_parameters():
        parameter.copy_(before[name])
    return ranks


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_stdit_lora", of=LORAS))
def test_a_batch_is_predicted_as_each_of_its_samples_alone(settings, name):  # noqa: F811
    seen = []

    class Compared(use_case(name)):
        def denoising_loss(self, latents, random, predict, *args, **kwargs):
            def compared(noised, r):
                level = self.diffusion.noise_cond.level
                network, told = self.networks["generator"], predict.keywords
                seen.append(compare(network, noised, r, told, lambda r: level(r).flip(0)))
                return predict(noised, r)

            return super().denoising_loss(latents, random, compared, *args, **kwargs)

    given = of(name, module_filters=["."], updates=2, dtype="float32", validation_samples=0, save_every=2)
    train(name, settings(name, "compared", **given), Compared)
    assert any(len(set(ranks)) > 1 for ranks in seen)


@pytest.mark.integration
@pytest.mark.bits
@pytest.mark.parametrize("name", represented_by("train_sd_lora", of=LORAS))
def test_a_run_in_two_halves_is_the_run_in_one(settings, name):  # noqa: F811
    whole = settings(name, "whole", **of(name))
    halves, full = whole | {"experiment_id": "halves"}, whole | {"experiment_id": "full", "min_rank": None}
    lines = train(name, whole)
    train(name, halves | {"updates": 2})
    assert numbers(train(name, halves)) == numbers(lines)
    assert all(torch.equal(t, files(whole)["lora"][key]) for key, t in files(halves)["lora"].items())
    first, other = lines[0], train(name, full | {"updates": 1})[0]
    assert first["samples_hash"] == other["samples_hash"]
    assert first["loss"] == pytest.approx(other["loss"])  # adapters start without a change
    assert first["grad_norm"] < 0.999 * other["grad_norm"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_rank": 8}, "min_rank: 8 is not below the rank, 8, so it changes nothing"),
        ({"min_rank": 2, "adapter": "lokr"}, "min_rank: LoKr has no columns"),
        ({"min_rank": 2, "adapter": "loha"}, "min_rank: LoHa has no columns"),
        ({"min_rank": 2, "dora": True}, "remove min_rank or dora"),
    ],
)
def test_what_it_does_not_go_with_is_refused(keys, message):
    class Config(LoraKeys):
        pass

    with pytest.raises(ConfigError, match=message):
        make_config(Config, {"module_filters": ["."], "rank": 8} | keys)


def test_a_file_says_it_and_other_programs_are_said_not_to_know_it():
    network = nn.Sequential(nn.Linear(8, 8))
    add_adapters(network, ["."], LoraSettings(rank=4, alpha=4, min_rank=2))
    lora = lora_of(network)
    assert with_min_rank(lora, {"min_rank": "3"}).min_rank == 3
    assert lora.min_rank == with_min_rank(lora, {}).min_rank == 2
    assert notes_of_ranks([lora], "warpcore") == []
    assert "with min_rank: 2; other programs" in notes_of_ranks([lora], "kohya")[0]
    for said in ("0", "-1", "2.5", "null", "9" * 5000, "²"):
        with pytest.raises(LoraFileError, match="which is no number from 1"):
            with_min_rank(lora, {"min_rank": said})
    network = nn.Sequential(nn.Linear(8, 8))
    add_adapters(network, ["."], LoraSettings(rank=4, alpha=4, dora=True))
    with pytest.raises(LoraFileError, match="the adapter of 0 is no plain LoRA"):
        with_min_rank(lora_of(network), {"min_rank": "2"})
