"""The loss and the samplers hold for latents of any shape, any number of steps, and in bfloat16."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.bounds import bounded, fuzz
from warpcore.diffusion.diffusion import GDF
from warpcore.diffusion.guidance import Guidance
from warpcore.diffusion.processes import discrete_process, flow_process
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.diffusion.tables import TableSchedule
from warpcore.diffusion.times import Steps, last_part, sampling_times

SHAPES = st.lists(st.integers(1, 5), min_size=0, max_size=3)  # of one channel's numbers, pictures, or clips
TIMESTEPS = 50


class Network(torch.nn.Module):
    """Says a little of everything, in the dtype of autocast; `wide` is how much wider than its input it predicts."""

    def __init__(self, channels: int, wide: int):
        super().__init__()
        torch.manual_seed(channels)
        self.layer = torch.nn.Linear(channels, wide * channels)

    def forward(self, x: Tensor, t: Tensor, **conditions: Tensor) -> Tensor:
        t = t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)
        predicted = self.layer((x / (1 + x.abs()) + 0.1 * (t / TIMESTEPS).cos()).movedim(1, -1))
        return predicted.movedim(-1, 1)


@st.composite
def processes(draw) -> tuple[GDF, int]:
    """A process, and how many times the channels of the latents its network predicts."""
    if draw(st.booleans()):
        return flow_process(shift=draw(st.sampled_from([1.0, 3.0]))), 1
    learned = draw(st.booleans())
    zero_snr = draw(st.booleans())
    target = draw(st.sampled_from(["v", "x0"] if zero_snr else ["epsilon", "v", "x0"]))
    process = discrete_process(
        draw(st.sampled_from(["linear", "scaled_linear", "cosine"])), target, steps=TIMESTEPS,
        zero_terminal_snr=zero_snr, learned_variance=learned,
    )  # fmt: skip
    return process, 1 + learned


@fuzz(60)
@given(processes(), SHAPES, st.integers(1, 3), st.integers(1, 4), st.booleans(), st.data())
def test_losses_are_finite_teach_and_do_not_depend_on_the_batch(tmp_path, process, shape, batch, channels, half, data):
    diffusion, wide = process
    uniform = torch.tensor(data.draw(st.lists(st.floats(0, 0.999), min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(batch)
    x0, noise = torch.randn(2, batch, channels, *shape, generator=generator)
    network = Network(channels, wide)
    with bounded(tmp_path), torch.autocast("cpu", torch.bfloat16, enabled=half):
        diffused = diffusion.diffuse(x0, noise, uniform)
        prediction = network(diffused.noised, diffused.noise_cond)
        loss, raw, _ = diffusion.loss(diffused, prediction)
    assert loss.shape == raw.shape == (batch,)
    assert loss.dtype == raw.dtype == torch.float32
    loss.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())
    assert (network.layer.bias.grad[:channels] != 0).all()  # at timestep 0, an unlikely mean teaches no variance
    alone = diffusion.loss(type(diffused)(*(value[:1] for value in diffused)), prediction[:1].detach()).loss
    torch.testing.assert_close(alone, loss[:1].detach(), rtol=1e-5, atol=1e-6)
    mask = torch.ones(batch, 1, *shape)
    torch.testing.assert_close(diffusion.loss(diffused, prediction, mask).loss, loss)


@fuzz(80)
@given(processes(), st.sampled_from(sorted(DIT_SAMPLERS)), SHAPES, st.integers(1, 4), st.booleans(), st.data())
def test_drawings_are_finite_whatever_the_shape_and_number_of_steps(
    tmp_path, process, sampler, shape, channels, half, data
):
    diffusion, wide = process
    if sampler == "iddpm" and wide == 1:
        return
    times, number = None, data.draw(st.integers(1, TIMESTEPS - 1))
    if isinstance(diffusion.schedule, TableSchedule):
        times = sampling_times(diffusion.schedule, number, sampler)
        if data.draw(st.booleans()):
            times = last_part(times, data.draw(st.floats(1 / number, 1)))
        assert len(times) <= number + 1
    generator = torch.Generator().manual_seed(number)
    draw = lambda step: torch.randn(2, channels, *shape, generator=generator)  # noqa: E731
    guidance = data.draw(st.sampled_from([None, Guidance(3.0, rho=0.0), Guidance(3.0, rho=0.0, channels=1)]))
    with bounded(tmp_path), torch.autocast("cpu", torch.bfloat16, enabled=half):
        steps = list(
            diffusion.sample(
                Network(channels, wide), {}, draw(-1), guidance=guidance, noise=draw,
                sampler=DIT_SAMPLERS[sampler](diffusion.input_scaler), steps=Steps(number, times=times),
            )
        )  # fmt: skip
    assert len(steps) >= (number if times is None else len(times) - 1)
    for values in steps:
        assert all(value.shape == (2, channels, *shape) and value.dtype == torch.float32 for value in values)
    assert all(value.isfinite().all() for value in steps[-1])
