"""The fused feed-forward layers: the same numbers as the plain ones, with less kept."""

import copy

import pytest
import torch

from modules.feed_forward import FeedForward
from modules.stage_c import StageC
from tests.modules.test_quantise import INPUTS


def layers(c_in: int = 12, c: int = 8, dropout: float = 0.0) -> FeedForward:
    torch.manual_seed(0)
    made = FeedForward(c_in, c, dropout)
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def plain(module: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes layer by layer."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, FeedForward):
            layer.fused = False
    return module


def test_gradients_are_those_of_small_differences():
    made = layers().double()
    names = [name for name, _ in made.named_parameters()]

    def call(x, *parameters):
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))

    x = torch.randn(2, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in made.parameters())))


def test_a_channel_of_zeros_gets_finite_gradients():
    made = layers()
    made[0].weight.data.zero_(), made[0].bias.data.zero_()
    x = torch.randn(1, 2, 2, 12, requires_grad=True)
    made(x).sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, *made.parameters()))


def test_one_wide_activation_less_is_kept_for_each_that_is_named():
    x = torch.randn(2, 4, 4, 12)
    kept = []
    for network in (layers(), plain(layers())):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t) or t, lambda t: t):
            network(x)
        wide = {t.untyped_storage().data_ptr() for t in shapes if t.numel() == 2 * 4 * 4 * 32}
        kept.append(len(wide))
    assert kept[0] == 2  # what goes into the function, and into the last layer
    assert kept[1] >= 3


def network() -> StageC:
    torch.manual_seed(0)
    made = StageC(
        c_cond=64, c_hidden=[64, 64], nhead=[4, 4], blocks=[[1, 1], [1, 1]], c_clip_text=64, c_clip_text_pooled=64,
        c_clip_img=64, dropout=0.1,
    )  # fmt: skip
    for parameter in made.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return made.train()


def losses(trained: StageC, dtype: torch.dtype, seed: int = 0, updates: int = 4) -> torch.Tensor:
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    found = []
    for update in range(updates):
        torch.manual_seed(update)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = (trained(**INPUTS).float() - 1).square().mean()
        loss.backward()
        if seed:  # what another order of additions does to bfloat16: a last bit here and there
            for parameter in trained.parameters():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed + update))
                parameter.grad *= 1 + 2**-9 * noise
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.parametrize("checkpointing", [0, 2])
def test_losses_of_fused_and_plain_networks_agree(checkpointing):
    fused = network()
    fused.set_activation_checkpointing(checkpointing)
    torch.testing.assert_close(
        losses(fused, torch.float32), losses(plain(network()), torch.float32), rtol=1e-5, atol=0
    )


def test_losses_in_bfloat16_agree_within_the_spread_of_rounding():
    reference = losses(plain(network()), torch.bfloat16)
    spread = max((losses(plain(network()), torch.bfloat16, seed) - reference).abs().max() for seed in (100, 200))
    exact = losses(network(), torch.float32)
    fused = losses(network(), torch.bfloat16)
    # Against float32, fused is no further off than plain, and the two differ by no more than rounding makes them.
    assert (fused - exact).abs().max() <= 1.5 * (reference - exact).abs().max()
    assert (fused - reference).abs().max() <= max(3 * spread, 2**-9 * reference.max())
