"""Clips are drawn around given frames: these stay, or join the others from their share of noise on."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from families.common.sampling import draw_latents
from tests.fake_gpu import GPU, FakeGpu
from warpcore.diffusion.processes import flow_process
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

SHAPE, STEPS, SEEDS = (2, 4, 3, 3), 5, [3, 11]
TIMES = [1 - step / STEPS for step in range(STEPS + 1)]


class Towards(nn.Module):
    """Predicts the way to a signal that depends on the frames around, as attention does, and on who is noised."""

    def __init__(self):
        super().__init__()
        self.scale, self.told = nn.Parameter(torch.tensor(0.5)), []

    def forward(self, x: Tensor, t: Tensor, *, text: Tensor, x_mask: Tensor | None = None) -> Tensor:
        self.told.append(x_mask)
        mask = torch.ones(len(x), x.shape[2]) if x_mask is None else x_mask.to(x)
        seen = x.mean(dim=2, keepdim=True) * mask[:, None, :, None, None]
        return self.scale * seen - x + text.view(-1, 1, 1, 1, 1) + t.view(-1, 1, 1, 1, 1) / 1000


def drawn(network: nn.Module, shares: Tensor | None, given: Tensor, device: str | torch.device = "cpu") -> Tensor:
    text = to_device(torch.tensor([0.3, 0.9]), torch.device(device))
    return draw_latents(
        flow_process(signalwards=True), network, {"text": text}, {"text": torch.zeros_like(text)}, SHAPE, SEEDS,
        steps=STEPS, guidance=3.0, guidance_rescale=0.0, sampler="euler",
        given_frames=None if shares is None else (given, shares),
    )  # fmt: skip


def euler(network: nn.Module, shares: Tensor, given: Tensor) -> Tensor:
    """The same, written out for straight flows: x + (t - t') v."""
    random, text = SampleRandom(SEEDS), torch.tensor([0.3, 0.9])
    x = torch.where((shares >= 1)[:, None, :, None, None], random.normal("initial noise", *SHAPE), given)
    was = shares >= 1
    for step, (t, after) in enumerate(pairwise(TIMES)):
        active = (shares >= 1) | ((shares > 0) & (shares >= t - 1e-6)) if step else was
        if step:
            noise = random.normal(f"noise of step {step - 1}", *SHAPE)
            x = torch.where((active & ~was)[:, None, :, None, None], (1 - t) * x + t * noise, x)
        was, time = active, torch.full((2,), 1000 * t)
        told, untold = (network(x, time, text=one, x_mask=active) for one in (text, torch.zeros(2)))
        moved = x + (t - after) * (untold + 3 * (told - untold))
        x = torch.where(active[:, None, :, None, None], moved, x)
    return x


@torch.no_grad()
def test_frames_stay_or_join_at_their_share_of_noise():
    given = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([[0.0, 1.0, 0.65, 1.0], [1.0, 0.3, 0.0, 1e-3]])
    network = Towards()
    found = drawn(network, shares, given)
    assert [mask[:2].tolist() for mask in network.told] == [mask[2:].tolist() for mask in network.told]
    assert [int(mask[:2].sum()) for mask in network.told] == [3, 3, 4, 4, 5]  # 0.65 at time 0.6, and 0.3 at 0.2
    kept = shares == 0
    assert torch.equal(found.transpose(1, 2)[kept], given.transpose(1, 2)[kept])
    torch.testing.assert_close(found, euler(Towards(), shares, given), rtol=0, atol=1e-5)


@torch.no_grad()
def test_clips_of_which_nothing_is_given_are_those_without_masks():
    given, everything = torch.randn(2, *SHAPE), torch.ones(2, 4)
    plain = drawn(Towards(), None, given)
    torch.testing.assert_close(drawn(Towards(), everything, given), plain, rtol=0, atol=1e-5)
    assert math.isfinite(plain.abs().max())


def test_nobody_waits_for_the_gpu():
    shares = torch.tensor([[0.0, 1.0, 0.65, 1.0], [1.0, 0.3, 0.0, 1.0]])
    given = torch.zeros(2, *SHAPE)
    with FakeGpu() as gpu, torch.no_grad():
        network = Towards().to(GPU)
        with gpu.watched():
            assert drawn(network, shares, given, GPU).device.type == "cuda"
