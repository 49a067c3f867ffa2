"""Updates of a training script without its data: what they need, before a run, or how fast they are."""

import importlib.util
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from warpcore import gradients, optim
from warpcore.config import Config
from warpcore.data.fields import collate
from warpcore.data.geometry import CropGeometry
from warpcore.data.images import place
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.files import why_no_file
from warpcore.fused_backward import check_one_process
from warpcore.meta import META, MetaAsDevice, MixMetaWithCPU, PeakMemory, only_shapes
from warpcore.networks import Checkpointing, blocks, has_blocks
from warpcore.processes import alone, choose_dtype
from warpcore.resuming import Origin
from warpcore.sharded import stored_bytes
from warpcore.use_case import UseCase

MADE_UP_FPS = 24.0
"""Frames per second of clips that are made up."""


def load_use_case(path: Path) -> type[UseCase]:
    """The use case in a training script.

    Raises:
        UserError: there is none.
    """
    if problem := why_no_file(path):
        raise UserError(f"{path} {problem}: the training script comes first, then its config")
    module = _module(path)
    own = [kind for kind in vars(module).values() if isinstance(kind, type) and kind.__module__ == module.__name__]
    found = [kind for kind in own if issubclass(kind, UseCase)]
    if not found:
        raise UserError(f"{path} defines no use case (a subclass of WarpCore): give one of the scripts in train/")
    return found[-1]


def _module(path: Path) -> ModuleType:
    """The module of a script; where it lies in a package, the package's, so that it is imported once."""
    names, folder = [path.stem], path.resolve().parent
    while (folder / "__init__.py").is_file():
        names, folder = [folder.name, *names], folder.parent
    if len(names) > 1 and importlib.util.find_spec(names[0]) is not None:
        found = importlib.util.find_spec(".".join(names))
        if found is not None and path.samefile(found.origin):
            return importlib.import_module(found.name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise UserError(f"{path} is no Python script: the training script comes first, then its config")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def bucket_sizes(run: UseCase) -> list[tuple[int, ...]]:
    """The sizes (H, W) of a run's pictures, or (frames, H, W) of its clips, those of the largest micro-batch first."""
    buckets = run.config.buckets(run.bucket_factor)
    own = buckets.micro_batch_sizes
    return sorted(set(buckets.sizes), key=lambda size: (-math.prod(size) * own.get(size, 1), size))


def made_up_batch(run: UseCase, size: tuple[int, ...], count: int) -> Batch:
    """A micro-batch of black pictures or clips and empty captions, on the CPU."""
    fields = run.extra_fields()
    extra = collate(fields, [{name: field.blank(size) for name, field in fields.items()}] * count)
    columns = {name: torch.zeros(count, dtype=torch.int64) for name in run.index_columns()}
    if len(size) == 3:
        images = torch.zeros(count, size[0], 3, *size[1:], dtype=torch.uint8)
        columns["fps"] = torch.full((count,), MADE_UP_FPS)
    else:
        images = torch.zeros(count, 3, *size, dtype=torch.uint8).to(memory_format=torch.channels_last)
    batch = Batch(
        number=0, size=size, lane=0, epoch=0, state={}, images=images if run.needs_images else None,
        captions=[""] * count, keys=[str(i) for i in range(count)], seeds=list(range(count)), weight=1.0, extra=extra,
        columns=columns,
        geometry=CropGeometry.of([place(size[-2:], size[-2:])] * count) if run.needs_geometry else None,
    )  # fmt: skip
    for name, function in run.computed_in_workers().items():
        batch.extra[name] = function(batch)
    return batch


@dataclass(frozen=True)
class Needs:
    """Bytes of memory that a process needs for a run, by what for: on the device, but for `on_cpu`."""

    frozen: int
    """Weights of the networks that aren't trained."""
    weights: int
    """Weights of the networks that are trained."""
    gradients: int
    optimizer: int
    ema: int
    on_cpu: int
    """What waits in the CPU's memory, of all these."""
    activations: int = 0
    """What an update needs at its peak beyond all others, encoders included."""

    @property
    def total(self) -> int:
        return self.frozen + self.weights + self.gradients + self.optimizer + self.ema + self.activations


class OnShapes:
    """A use case whose networks have shapes, and no weights, as if they were on a device of the type `kind`.

    Fusing (`compile`, `fp8`) is not counted. Made, and used, inside `with` alone: it holds the modes of PyTorch that
    it takes.

    Args:
        processes: over which `use_fsdp` shards weights, gradients, optimizer and average.
        origin: the checkpoint that the run goes on from.
    """

    def __init__(
        self, use_case: type[UseCase], config: Config, kind: str, processes: int = 1, origin: Origin | None = None
    ):
        self.use_case, self.kind, self.processes, self.origin = use_case, kind, processes, origin
        check_one_process(config.fused_backward, processes)
        self.config = config.model_copy(update={"device": "cpu", "fp8": False, "compile": False})
        self.dtype = choose_dtype(config.precision, torch.device(kind))
        self.sharded = config.use_fsdp and (processes > 1 or config.fsdp_cpu_offload)
        self.shards = (config.fsdp_shards or processes) if self.sharded else 1
        if processes % self.shards:
            raise UserError(f"fsdp_shards: {self.shards} does not divide the {processes} processes (--processes)")
        self._modes = ExitStack()

    def __enter__(self) -> "OnShapes":
        try:
            self._modes.enter_context(only_shapes())
            self._modes.enter_context(alone())
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        whole = self.config.for_any_processes().model_copy(update={"use_fsdp": False, "fsdp_cpu_offload": False})
        run = self.run = self.use_case(whole)
        self._modes.callback(run.close)
        run.dtype, run.device, run.update, run.autocast = self.dtype, META, 0, nullcontext
        run.origin = self.origin
        build = run.build
        run.build = lambda: {name: network.to_empty(device=META) for name, network in build().items()}
        self._modes.enter_context(MixMetaWithCPU())
        run.make_networks(self.origin.values if self.origin else None)
        self._modes.enter_context(MetaAsDevice(self.kind, run.dtype))

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def needs(self, size: tuple[int, int], micro_batch: int, accumulation: int = 1) -> Needs:
        """What a process needs for updates with micro-batches of a bucket (H, W)."""
        activations, sent_away = self._activations(size, micro_batch, accumulation)
        needs = self.between_updates()  # frozen networks that the loss needs have come to stay
        thinned = sum(parameter.nbytes for parameter in self.run.thinned)  # a copy, once activations are gone
        activations = max(activations, thinned)
        return replace(needs, activations=activations + self._gathered(), on_cpu=needs.on_cpu + sent_away)

    def between_updates(self) -> Needs:
        """What it needs even then, gradients included."""
        config = self.config
        weights = sum(p.nbytes for p in self.run.parameters.values()) // self.shards
        gradients = max(p.nbytes for p in self.run.parameters.values()) if config.fused_backward else weights
        trained = {"weights": weights, "gradients": gradients, "optimizer": self._optimizer_bytes // self.shards}
        averages = [*self.run.averages.values(), *self.run.state.post_hoc_averages]
        ema = sum(tensor.nbytes for average in averages for tensor in average.state_dict().values())
        ema //= self.shards
        frozen, on_cpu = self._frozen()
        if config.fsdp_cpu_offload:
            return Needs(frozen, 0, 0, 0, 0, on_cpu + sum(trained.values()) + ema)
        if config.ema_device == "cpu":
            return Needs(frozen, **trained, ema=0, on_cpu=on_cpu + ema)
        return Needs(frozen, **trained, ema=ema, on_cpu=on_cpu)

    def _frozen(self) -> tuple[int, int]:
        """Bytes on the device, and in the CPU's memory, of what isn't trained."""
        on_device = on_cpu = 0
        for name, network in self.run.networks.items():
            weights = sum(stored_bytes(p) for p in network.parameters() if not p.requires_grad)
            buffers = sum(b.nbytes for b in network.buffers())
            on_demand, swap = self.run.on_demand.get(name), self.run.block_swaps.get(name)
            if self._is_sharded(name) and self.config.fsdp_cpu_offload:
                on_device, on_cpu = on_device + buffers, on_cpu + weights // self.shards
            elif self._is_sharded(name):
                on_device += weights // self.shards + buffers
            elif on_demand is not None and not on_demand.stays:
                on_cpu += weights + buffers
            else:
                waiting = 0 if swap is None else swap.nbytes
                on_device, on_cpu = on_device + weights + buffers - waiting, on_cpu + waiting
        return on_device, on_cpu

    def _is_sharded(self, name: str) -> bool:
        return self.sharded and (name in self.run.trainable or has_blocks(self.run.networks[name]))

    def set_checkpointing(self, level: int) -> None:
        """Change `activation_checkpointing` of every network that offers it."""
        for network in self.run.networks.values():
            if isinstance(network, Checkpointing):
                network.set_activation_checkpointing(level)

    def _activations(self, size: tuple[int, int], micro_batch: int, accumulation: int) -> tuple[int, int]:
        """Bytes on the device at the peak of an update, and the most that wait in the CPU's memory."""
        run = self.run
        trained, staying = list(run.parameters.values()), self._staying()
        batch = made_up_batch(run, size, micro_batch)
        for network in run.trainable:
            run.networks[network].train()
        with ExitStack() as undo:
            if self.sharded:  # each block's weights are gathered in the type computed in, its gradients go elsewhere
                for parameter in trained:
                    undo.callback(setattr, parameter, "data", parameter.data)
                    parameter.data = parameter.data.to(run.dtype)
                    undo.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
            there = [t for n in run.networks.values() for t in (*n.parameters(), *n.buffers())]
            if run.fused is not None:
                there += self._stepping_in_the_backward_pass(undo)
            memory = undo.enter_context(PeakMemory(there, device="meta"))
            kept = PeakMemory(device="cpu")
            if "activations" in self.config.offload:
                undo.enter_context(kept)
            batch = batch._map(lambda tensor: torch.empty_like(tensor, device=META))
            for _ in range(3 if run.block_swaps else 1):  # those learn in two updates which block follows which
                for parameter in trained:  # the micro-batches after an update's first begin with gradients there
                    begun = accumulation > 1 and not self.sharded
                    parameter.grad = torch.empty_like(parameter) if begun else None
                memory.peak, kept.peak = memory.alive, kept.alive
                _backward(run.forward(batch).loss.mean())
        gradients = sum(p.grad.nbytes for p in trained if p.grad is not None)
        if run.fused is not None:
            gradients = self.between_updates().gradients
            run.fused.finish()
        for parameter in trained:
            parameter.grad = None
        return max(0, memory.peak - gradients - (self._staying() - staying)), kept.peak

    def _stepping_in_the_backward_pass(self, undo: ExitStack) -> list[Tensor]:
        """The optimizers' state, all of which is there before, so that the pass makes no more of it."""
        run = self.run
        if self._optimizer_bytes and run.config.optimizer == "adamw8bit":  # whose kernels want memory
            run.fused.close()
            for parameter in run.parameters.values():
                undo.callback(parameter.register_post_accumulate_grad_hook(_drop_gradient).remove)
        return [*optim.optimizer_state(run.optimizers)[0].values()]

    def _staying(self) -> int:
        return sum(network.nbytes for network in self.run.on_demand.values() if network.stays)

    @cached_property
    def _optimizer_bytes(self) -> int:
        run = self.run
        if run.config.optimizer == "adamw8bit":  # its kernels want memory; two moments of a byte
            return 2 * sum(p.numel() for p in run.parameters.values())
        for parameter in run.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        for optimizer in run.optimizers:
            optimizer.step()
        for parameter in run.parameters.values():
            parameter.grad = None
        states = [state for optimizer in run.optimizers for state in optimizer.state.values()]
        return sum(t.nbytes for state in states for t in state.values() if isinstance(t, Tensor))

    def _gathered(self) -> int:
        """What FSDP gathers, in the type computed in: layers outside of blocks, and two blocks with their gradients.

        To and from the CPU's memory weights and gradients travel in float32: those of a block at a time, the gradients
        before and after they are added up.
        """
        networks = [network for name, network in self.run.networks.items() if self._is_sharded(name)]
        sizes = [_count(block) for network in networks for block in blocks(network)]
        largest, outside = max(sizes, default=0), sum(map(_count, networks)) - sum(sizes)
        travelling = 3 * 4 * largest if self.config.fsdp_cpu_offload else 0
        return (2 * 2 * largest + outside) * torch.finfo(self.run.dtype).bits // 8 + travelling


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _backward(loss: Tensor) -> None:
    """`loss.backward()` inside `MetaAsDevice`, which checkpointed blocks need when they run again."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class Rehearsal:
    """A use case with its networks and weights, and updates of it that change nothing.

    memory_limit: bytes; on a CPU needed, and counted as what tensors take.
    """

    def __init__(self, use_case: type[UseCase], config: Config, memory_limit: float | None = None):
        self.run, self.memory_limit = use_case(config.for_any_processes()), memory_limit
        if memory_limit is None and self.run.device.type != "cuda":
            raise UserError(f"on {self.run.device.type.upper()} there is no limit to find: give --max-memory GIB")

    def __enter__(self) -> "Rehearsal":
        self.run.update = 0
        self.run.make_networks()
        optim.set_lr(self.run.optimizers, 0.0)
        return self

    def __exit__(self, *error: object) -> None:
        self.run.close()

    def measure(self, size: tuple[int, int], count: int) -> tuple[float, int] | None:
        """(seconds, bytes at the peak) of an update with one micro-batch of a bucket (H, W), the faster of two.

        None where the memory is not enough.
        """
        on_cuda = self.run.device.type == "cuda"
        try:
            first = self.update(size, count) if on_cuda else None
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(self.run.device)
                seconds = min(first, self.update(size, count))
                peak = torch.cuda.max_memory_allocated(self.run.device)
            else:
                there = [*self.living()]
                with PeakMemory(there) as memory:
                    self.update(size, count)
                peak = memory.peak + sum(map(stored_bytes, there))
                seconds = self.update(size, count) if peak <= self.memory_limit else math.inf
        except torch.OutOfMemoryError:
            for parameter in self.run.parameters.values():
                parameter.grad = None
            torch.cuda.empty_cache()
            return None
        return None if self.memory_limit is not None and peak > self.memory_limit else (seconds, peak)

    def update(self, size: tuple[int, int], count: int) -> float:
        """Make an update with one micro-batch of a bucket (H, W); the seconds it took per micro-batch."""
        run = self.run
        batch = made_up_batch(run, size, count).to(run.device)
        self._wait()
        began = time.perf_counter()
        for network in run.trainable:
            run.networks[network].train()
        # A micro-batch that is not a whole update follows another one, whose gradients are there already.
        micro_batches = run.config.own_micro_batches or run.config.batch_size / count
        passes = 1 if micro_batches <= 1 else 2
        for _ in range(passes):
            run.forward(batch).loss.mean().backward()
            gradients.keep_largest(run.thinned, run.config.gradient_topk)
        optim.step(run.optimizers, torch.zeros((), device=run.device))
        for parameter in run.parameters.values():
            parameter.grad = None
        self._wait()
        return (time.perf_counter() - began) / passes

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)

    def living(self) -> Iterator[Tensor]:
        """What lives between updates."""
        for network in self.run.networks.values():
            yield from (*network.parameters(), *network.buffers())
        for average in (*self.run.averages.values(), *self.run.state.post_hoc_averages):
            yield from average.state_dict().values()
        yield from optim.optimizer_state(self.run.optimizers)[0].values()
