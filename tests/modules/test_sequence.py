"""Several processes that share the tokens of a sample predict, and learn, what one does."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modules.sequence import TokenShards
from modules.stdit import STDiT, STDiT2
from modules.stdit3 import STDiT3
from modules.stdit_parts import ClipTransformer
from tests.many_processes import launch_processes

SIZES = [(1, (5, 10, 14)), (2, (3, 9, 6)), (2, (1, 2, 2))]
"""(samples, latents): 35 and 15 patches in a frame, the last of them half zeros, and a single one."""


def network(kind: type[ClipTransformer] = STDiT3) -> ClipTransformer:
    torch.manual_seed(1)
    made = kind(hidden_size=48, depth=2, num_heads=4, caption_channels=12, model_max_length=6).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return made


def called(made: ClipTransformer, samples: int, size: tuple[int, int, int], graph: bool = True) -> Tensor:
    """Its prediction for clips with a given first frame and texts of unequal lengths."""
    random = torch.Generator().manual_seed(2)
    frames, height, width = size
    given = torch.ones(samples, frames, dtype=torch.bool)
    given[:, 0] = frames == 1
    conditions = {
        "fps": torch.full((samples,), 24.0),
        "height": torch.full((samples,), 8.0 * height),
        "width": torch.full((samples,), 8.0 * width),
        "mask": torch.arange(6)[None] < torch.tensor([[3], [5]])[:samples],
        "x_mask": given,
    }
    with torch.set_grad_enabled(graph):
        return made(
            torch.randn(samples, 4, *size, generator=random).double(),
            torch.linspace(100, 900, samples),
            torch.randn(samples, 6, 12, generator=random).double(),
            **{name: value for name, value in conditions.items() if name in made.conditions},
        )


def gradients(made: ClipTransformer, samples: int, size: tuple[int, int, int]) -> list[Tensor]:
    predicted = called(made, samples, size)
    target = torch.randn(predicted.shape, generator=torch.Generator().manual_seed(3)).double()
    (predicted - target).square().mean().backward()
    return [parameter.grad for parameter in made.parameters()]


@contextmanager
def group_of_all() -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    yield
    gc.collect()
    dist.destroy_process_group()


@group_of_all()
def compare() -> None:
    group = dist.group.WORLD
    for kind, level, (samples, size) in product((STDiT, STDiT2, STDiT3), (0, 3), SIZES):
        alone, together = network(kind), network(kind)
        together.split_sequence(group)
        together.set_activation_checkpointing(level)
        torch.testing.assert_close(called(together, samples, size), called(alone, samples, size))
        for shared, expected in zip(gradients(together, samples, size), gradients(alone, samples, size), strict=True):
            dist.all_reduce(shared)
            torch.testing.assert_close(shared / group.size(), expected)


@pytest.mark.integration
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_predictions_and_gradients_are_those_of_one_process(count):
    launch_processes(count, compare)


@group_of_all()
def exchange_and_count() -> None:
    samples, size = SIZES[0]
    made, sent = network(), []
    made.split_sequence(dist.group.WORLD)
    exchange, gather = dist.all_to_all_single, dist.all_gather

    def counted(received: Tensor, given: Tensor, group: dist.ProcessGroup):
        sent.append(given.nbytes)
        return exchange(received, given, group=group)

    gathered = []
    dist.all_to_all_single = counted
    dist.all_gather = lambda parts, own, group: (gathered.append(own.nbytes), gather(parts, own, group=group))
    called(made, samples, size, graph=False)
    # Own tokens: 18 of 35 patches, filled up by one, of 5 frames, with 48 numbers of 8 bytes.
    own = samples * 5 * 18 * 48 * 8
    assert sent == [3 * own, own] * len(made.spatial_blocks)
    assert gathered == [samples * 5 * 18 * 2 * 2 * 8 * 8]  # of the last layer


@pytest.mark.integration
def test_only_spatial_attention_exchanges_its_queries_keys_and_values_and_their_result():
    launch_processes(2, exchange_and_count)


def test_a_group_that_does_not_divide_the_heads_is_refused():
    class Three:
        def size(self) -> int:
            return 3

    with pytest.raises(ValueError, match="3 processes do not divide the 4 heads"):
        network().split_sequence(Three())


@group_of_all()
def share_one_token() -> None:
    group = dist.group.WORLD
    x = torch.arange(3.0)[None, None] + 1
    shards = TokenShards(group, 1)
    assert torch.equal(shards.own(x), x if group.rank() == 0 else torch.zeros_like(x))
    assert torch.equal(shards.whole(shards.own(x)), x)


@pytest.mark.integration
def test_a_process_may_have_no_token_at_all():
    launch_processes(2, share_one_token)
