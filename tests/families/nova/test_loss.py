"""NOVA's training loss, and its gradients, are those of the reference for its draws."""

import pytest
import torch
from torch import Tensor

from families.nova.loss import LOSS_REPEAT, TokenDraws, process, token_losses, token_times
from families.nova.masks import split_tokens, visible_tokens
from modules.nova import NOVATransformer
from modules.nova_decoder import unpatchify
from tests.golden import resolve
from tests.small_nova import golden_nova, load_nova
from warpcore.diffusion.diffusion import GDF
from warpcore.random import SampleRandom

CASES = ("loss_t2i", "loss_t2v", "loss_c2i", "loss_rope")
LOSSES = [(case, name) for case in CASES for name in load_nova(case)[0]]


class GivenCondition(NOVATransformer):
    """For a case that gives the condition's tokens themselves."""

    def condition(self, tokens: Tensor) -> Tensor:
        return tokens


class Recorded:
    """A training step of the reference."""

    def __init__(self, case: str, name: str):
        calls, self.tensors = load_nova(case)
        self.call = calls[name]
        self.network = golden_nova(case)
        given = resolve(self.call["kwargs"], self.tensors)
        x = given["x"]
        self.latents = x if x.dim() == 5 else x[:, :, None]
        if "c" in given:
            self.network.__class__ = GivenCondition
            self.condition = {"tokens": given["c"][0]}
        else:
            text = given["prompt"]
            self.condition = {"text": text, "lengths": torch.full((len(text),), text.shape[1])}
        if "motion_flow" in given:
            self.condition["flow"] = torch.tensor(given["motion_flow"])
        scheduler = self.call["noise_scheduler"]
        flow = scheduler["class"].startswith("FlowMatch")
        self.diffusion = process("flow", scheduler["kwargs"]["shift"]) if flow else process("ddpm")
        self.draws = self.recorded_draws(self.diffusion)
        self.expected = resolve(self.call["result"], self.tensors)
        self.atol = self.call["result_stats"]

    def recorded_draws(self, diffusion: GDF) -> TokenDraws:
        draws = resolve(self.call["draws"], self.tensors)
        order = draws["order_uniform"][..., 0]
        hidden, visible = split_tokens(order, visible_tokens(draws["mask_ratio"], order.shape[1]))
        t = draws.get("timestep_index")
        return TokenDraws(
            hidden, visible, draws["noise"], token_times(diffusion, draws["timestep_normal"]) if t is None else t
        )

    def agrees(self, found: Tensor, name: str) -> None:
        atol = self.atol[name].get("suggested_atol", 0)  # 0 of whole numbers
        torch.testing.assert_close(found.float(), self.expected[name].float(), rtol=0, atol=atol)


@pytest.mark.parametrize(("case", "name"), LOSSES)
def test_the_loss_and_its_gradients_are_those_of_the_reference(case, name):
    recorded = Recorded(case, name)
    network, call = recorded.network, recorded.call
    assert call["loss_repeat"] == LOSS_REPEAT
    seen = {}
    network.image_decoder.register_forward_hook(lambda _, given, made: seen.update(given=given, made=made))
    losses = token_losses(network, recorded.diffusion, recorded.latents, recorded.draws, recorded.condition)
    assert torch.equal(losses.loss, losses.raw)

    noised, times, z = seen["given"]
    recorded.agrees(times, "timestep")
    if "noised" in recorded.expected:  # not kept of every case
        recorded.agrees(unpatchify(noised, network.image_base_size, 2), "noised")
    recorded.agrees(z[: len(z) // LOSS_REPEAT], "image_encoder")
    recorded.agrees(seen["made"], "prediction")
    assert torch.equal(recorded.draws.hidden.float()[..., None], recorded.expected["mask"])

    frames = losses.loss.mean(dim=0)
    found = {"loss": frames[0]} if len(frames) == 1 else {"loss_t2i": frames[0], "loss_i2i": frames[1:].mean()}
    assert found.keys() == recorded.expected["losses"].keys()
    for part, loss in found.items():
        atol = recorded.atol["losses"][part]["suggested_atol"]
        torch.testing.assert_close(loss, recorded.expected["losses"][part], rtol=0, atol=atol)
    total = losses.of_samples(losses.loss).mean()
    torch.testing.assert_close(total, sum(recorded.expected["losses"].values()), rtol=1e-5, atol=1e-5)

    total.backward()
    parameters = dict(network.named_parameters())
    for parameter, numbers in call["gradients"].items():
        gradient = parameters[parameter].grad
        if numbers is None:
            assert gradient is None or not gradient.any()
        else:
            norm, total = numbers
            assert gradient.norm().item() == pytest.approx(norm, rel=2e-4, abs=1e-6), parameter
            assert gradient.sum().item() == pytest.approx(total, rel=1e-3, abs=1e-4 * max(norm, 1e-2)), parameter


def test_without_the_first_frame_the_others_are_learned_alone():
    recorded = Recorded("loss_t2v", "ddpm_3_frames")
    losses = token_losses(
        recorded.network, recorded.diffusion, recorded.latents, recorded.draws, recorded.condition
    )  # fmt: skip
    later = losses.of_samples(losses.loss, first=False)
    torch.testing.assert_close(later.mean(), recorded.expected["losses"]["loss_i2i"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "t"), [("flow", 0.25), ("ddpm", 250)])
def test_at_a_given_level_all_tokens_have_it_and_a_sample_hides_the_same_ones_beside_others(kind, t):
    diffusion, sizes = process(kind), {"frames": 3, "tokens": 24, "numbers": 16, "repeats": 2}
    both = TokenDraws.of(SampleRandom([1, 2], level=0.25), diffusion, **sizes)
    assert set(both.t.flatten().tolist()) == {t}
    alone = TokenDraws.of(SampleRandom([2], level=0.25), diffusion, **sizes)
    assert torch.equal(alone.hidden, both.hidden[3:])


def test_draws_belong_to_samples_and_have_the_published_distributions():
    diffusion = process("flow")
    both = TokenDraws.of(SampleRandom([1, 2]), diffusion, frames=3, tokens=24, numbers=16, repeats=4)
    assert both.hidden.shape == (6, 24)
    assert both.noise.shape == (24, 24, 16)
    assert both.t.shape == (24, 24)
    assert (~both.hidden).sum(dim=1).tolist() == [both.visible.shape[1]] * 6
    alone = TokenDraws.of(SampleRandom([1]), diffusion, frames=3, tokens=24, numbers=16, repeats=4)
    assert torch.equal(alone.hidden, both.hidden[:3])
    assert torch.equal(alone.noise.unflatten(0, (4, 1, 3)), both.noise.unflatten(0, (4, 2, 3))[:, :1])
    assert torch.equal(alone.t.unflatten(0, (4, 1, 3)), both.t.unflatten(0, (4, 2, 3))[:, :1])
    many = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    shares = token_times(diffusion, many)
    assert 0 < shares.min() < shares.max() <= 1
    expected = many.sigmoid()
    torch.testing.assert_close(shares.quantile(0.25), expected.quantile(0.25), rtol=0, atol=0.01)
    timesteps = token_times(process("ddpm"), many)
    assert timesteps.dtype == torch.int64
    assert timesteps.bincount(minlength=1000).float().std() < 15  # of 100 each; a binomial's is 10
    assert (timesteps.min(), timesteps.max()) == (0, 999)
