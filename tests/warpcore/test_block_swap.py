"""Blocks that wait in the CPU's memory change no update; two at most are on the device, the next one ahead of time."""

import weakref
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from families.common.precision import freeze
from modules.blocks import Block, compile_blocks, set_activation_checkpointing
from modules.lora import LoraSettings, adapters, add_adapters
from tests.fake_gpu import GPU
from tests.warpcore.test_offload import GpuBesidePinnedMemory
from warpcore.block_swap import BlockSwap, evenly, swappable
from warpcore.errors import UserError
from warpcore.offload import Waiting, keep_inputs_on_cpu
from warpcore.sharded import plain_parts

CPU, WIDTH = torch.device("cpu"), 128


class Layer(Block):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.second(torch.tanh(self.first(x)))


class Chain(nn.Module):
    """Blocks that compute in another order than that of their list, and one of them twice."""

    ORDER = (1, 0, 2, 3, 2, 4, 5)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(6))

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)

    def set_activation_checkpointing(self, level: int) -> None:
        set_activation_checkpointing(self.blocks, level)

    def forward(self, x: Tensor) -> Tensor:
        for number in self.ORDER:
            x = self.layers[number](x)
        return x


def chain(weights: str = "float32", dora: bool = False) -> Chain:
    """With adapters that have begun to learn, beside frozen weights."""
    torch.manual_seed(0)
    network = Chain()
    freeze(network, weights, "frozen_weights")
    add_adapters(network, ["first"], LoraSettings(rank=2, alpha=2, dora=dora))
    for _, _, adapter in adapters(network):
        adapter.up.data.normal_(generator=torch.Generator().manual_seed(1))
    network.set_activation_checkpointing(3)
    return network


X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))


def passes(network: Chain) -> list[Tensor]:
    """What two updates and a pass without gradients compute, and the gradients."""
    found = []
    for _ in range(2):
        found.append(network(X))
        found[-1].float().square().sum().backward()
    with torch.no_grad():
        found.append(network(X))
    return found + [parameter.grad for parameter in network.parameters() if parameter.requires_grad]


class Seen:
    """Which blocks were sent to the device, by their number among those that wait, and which are there."""

    def __init__(self, monkeypatch, swap: BlockSwap):
        self.sent, self.there, self.most = [], [], 0
        numbers = {id(waiting): number for number, waiting in enumerate(swap._blocks)}
        empty = Waiting.empty

        def watched(waiting: Waiting) -> list[Tensor]:
            room, number = empty(waiting), numbers[id(waiting)]
            self.sent.append(number)
            self.there.append(number)
            self.most = max(self.most, len(self.there))
            alive = [len(room)]
            for tensor in room:
                weakref.finalize(tensor.untyped_storage(), self._gone, number, alive)
            return room

        monkeypatch.setattr(Waiting, "empty", watched)

    def _gone(self, number: int, alive: list[int]) -> None:
        alive[0] -= 1
        if not alive[0]:
            self.there.remove(number)


@pytest.mark.bits
@pytest.mark.parametrize("further", ["", "compiled", "inputs on the CPU"])
@pytest.mark.parametrize(
    ("weights", "dora"),
    [("float32", False), ("float32", True), ("float8_e4m3fn", False), ("int8_rotated", True), ("nf4", True)],
)
def test_outputs_and_gradients_are_the_same(weights, dora, further, monkeypatch):
    if weights == "nf4":
        pytest.importorskip("torchao.quantization", reason="an optional package")
    plain, swapped = chain(weights, dora), chain(weights, dora)
    monkeypatch.setattr(torch, "compile", lambda compute: lambda *inputs: compute(*inputs))
    for network in (plain, swapped):
        if further == "compiled":
            compile_blocks(network.blocks)
        if further == "inputs on the CPU":
            keep_inputs_on_cpu(network)
    BlockSwap(swapped, 5, CPU)
    for ours, theirs in zip(passes(swapped), passes(plain), strict=True):
        assert torch.equal(ours, theirs)


def test_scales_of_packed_weights_are_on_the_device_as_they_are_saved_and_averaged_there():
    network = chain("int8")
    BlockSwap(network, 5, torch.device("meta"))
    assert {buffer.device.type for buffer in network.buffers()} == {"meta"}
    assert {parameter.device.type for parameter in network.parameters()} == {"meta", "cpu"}


def test_all_that_weights_are_packed_into_is_copied():
    pytest.importorskip("torchao.quantization", reason="an optional package")
    network = chain("nf4")
    for tensor in Waiting(network.modules(), torch.device("meta")).copies():
        assert {part.device.type for part in plain_parts(tensor)} == {"meta"}


def test_two_blocks_at_most_are_on_the_device_and_the_next_one_is_sent_while_one_computes(monkeypatch):
    network = chain()
    swap = BlockSwap(network, 6, CPU)
    seen, computing = Seen(monkeypatch, swap), []
    for number, layer in enumerate(network.layers):
        layer.first.register_forward_pre_hook(lambda _, __, n=number: computing.append((n, sorted(seen.there))))
    for _ in range(2):
        network(X).sum().backward()
    assert seen.there == [1]  # for the next update
    first, seen.most = len(seen.sent), 0
    computing.clear()
    network(X).sum().backward()
    order = [*Chain.ORDER, *reversed(Chain.ORDER)]
    assert [number for number, _ in computing] == order
    # Each block is there with the one after it: no other is. In the middle, and at the end, that is the same block.
    assert [there for _, there in computing] == [sorted({a, b}) for a, b in zip(order, [*order[1:], 1], strict=True)]
    assert seen.most == 2
    assert seen.sent[first:] == [following for number, following in pairwise(order) if number != following]
    swap.forget()
    assert seen.there == []


def test_what_comes_otherwise_than_before_is_fetched_when_its_turn_comes(monkeypatch):
    network = chain()
    swap = BlockSwap(network, 6, CPU)
    network(X).sum().backward()
    seen = Seen(monkeypatch, swap)
    with torch.no_grad():
        network(X)  # the last block is kept for a backward pass that does not come
        expected = chain().layers[0](X)
        assert torch.equal(network.layers[0](X), expected)
    assert seen.most <= 2


def test_a_fault_in_a_block_leaves_the_weights_in_their_places(monkeypatch):
    network = chain()
    before = network.state_dict()
    BlockSwap(network, 6, CPU)
    with pytest.raises(RuntimeError):
        network(X[:, :5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Streams:
    """Stand for CUDA's: what is asked of them is written down, in order."""

    def __init__(self, monkeypatch):
        self.log, self.copying, self.events = [], False, 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "stream", self._entered)
        fill = Waiting.fill

        def watched(waiting: Waiting, room: list[Tensor]) -> list[Tensor]:
            assert self.copying
            self.log.append("copy")
            return fill(waiting, room)

        monkeypatch.setattr(Waiting, "fill", watched)

    @contextmanager
    def _entered(self, stream):
        self.copying = True
        yield
        self.copying = False

    def wait_stream(self, other) -> None:
        assert not self.copying
        self.log.append("the copies wait for what computes")

    def record_event(self) -> int:
        assert self.copying
        self.events += 1
        self.log.append(f"copied {self.events}")
        return self.events

    def wait_event(self, event: int) -> None:
        assert not self.copying
        self.log.append(f"what computes waits for {event}")


def test_on_a_gpu_copies_have_a_stream_of_their_own_and_nothing_waits(monkeypatch):
    network, streams = chain(), Streams(monkeypatch)
    with GpuBesidePinnedMemory() as gpu:
        BlockSwap(network, 6, GPU)
        assert {p.device for p in network.parameters() if p.requires_grad} == {GPU}
        assert {p.device for p in network.parameters() if not p.requires_grad} == {CPU}
        x = X.to(GPU)
        for layer in network.layers:
            layer.first.register_forward_pre_hook(lambda *_: streams.log.append("compute"))
        for _ in range(2):
            network(x).sum().backward()
        streams.log.clear()
        with gpu.watched():
            network(x).sum().backward()
        assert {p.grad.device for p in network.parameters() if p.requires_grad} == {GPU}
    order = [*Chain.ORDER, *reversed(Chain.ORDER)]
    event, expected = int(streams.log[0].split()[-1]), []
    for number, following in zip(order, [*order[1:], 1], strict=True):
        expected.append(f"what computes waits for {event}")
        if following != number:  # sent before this one computes, into memory that nothing uses any more
            event += 1
            expected += ["the copies wait for what computes", "copy", f"copied {event}"]
        expected.append("compute")
    assert streams.log == expected


def test_blocks_are_spread_evenly_and_the_last_one_waits():
    layers = list(range(10))
    assert evenly(layers, 10) == layers
    assert evenly(layers, 5) == [1, 3, 5, 7, 9]
    assert evenly(layers, 3) == [2, 5, 9]


def test_what_is_trained_stays_and_blocks_that_are_trained_whole_are_left_alone():
    network = chain()
    network.layers[5].requires_grad_(True)
    assert swappable(network) == network.blocks[:5]
    with pytest.raises(UserError, match="swap_blocks: 6 blocks cannot wait, as Chain has 5 with frozen weights"):
        BlockSwap(network, 6, CPU)
    network.layers[1].norm = nn.BatchNorm1d(WIDTH)
    with pytest.raises(UserError, match="batch norms"):
        BlockSwap(network, 5, CPU)
    swap = BlockSwap(network, 3, CPU)  # of the first five, without the second
    assert swap.nbytes == 3 * 4 * 2 * (WIDTH * WIDTH + WIDTH)
