"""How fast an update is, and what memory it takes, beside diffusers' network in the plain loop of its examples.

    python3 benchmarks/train_step.py            # on a GPU the published sizes, else small ones on the CPU
    python3 benchmarks/train_step.py --cases "3.6B full 1024" --seconds 120
    python3 benchmarks/train_step.py --levels   # what the levels of activation checkpointing cost and save
    python3 benchmarks/family_step.py           # the same of the other families

Ours is the update that the training scripts make (autocast, loss, gradient norm, optimizer), on latents and conditions
that are there; beside it, ours with one technique changed at a time. The plain loop is that of diffusers' training
examples: its StableCascadeUNet under autocast, `clip_grad_norm_`, `torch.optim.AdamW` as it is by default, and peft
for LoRA. Contenders take turns in one process, each built anew for its turn; a row gives medians over all its updates.

Utilisation is the FLOPs of an update, counted by the formula in `benchmarks/flops.py`, over the card's dense bfloat16
peak, from its data sheet.
"""

import warpcore.openmp
import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.flops import TEXT_TOKENS, dense_peak, forward_flops
from benchmarks.techniques import Technique, techniques
from families.cascade.versions import VERSIONS
from families.common.precision import freeze
from families.common.sampling import latent_size
from modules.controlnet import ControlNet
from modules.feed_forward import FeedForward
from modules.lora import LoraSettings, add_adapters
from modules.stage_b import StageB
from modules.stage_c import StageC
from modules.unet import UNet
from warpcore import compute, optim
from warpcore.block_swap import BlockSwap, swappable
from warpcore.fused_backward import FusedBackward
from warpcore.meta import PeakMemory

GIB = 2**30
NO_TIME = "no time left: raise --seconds, or choose --cases"
PLAIN_LOOP = "diffusers, plain loop"
SMALL_C = {"c_cond": 384, "c_hidden": [384, 384], "nhead": [6, 6], "blocks": [[1, 2], [2, 1]], "dropout": 0.0}
SMALL_B = {
    "c_cond": 192, "c_hidden": [64, 128, 256, 256], "nhead": [-1, -1, 4, 4], "blocks": [[1, 1, 2, 1], [1, 2, 1, 1]],
    "block_repeat": [[1, 1, 1, 1], [2, 2, 2, 2]],
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, what of it is trained (full, LoRA, ControlNet), a picture size and a batch."""

    stage: type[UNet]
    arguments: dict
    name: str
    trained: str
    image_px: int
    batch: int
    checkpointing: int = 0
    compression: float = 42.67
    """Pixels per position of Stage C's latents; Stage B's are a quarter of the picture's sides."""

    @property
    def positions(self) -> int:
        """Sides of the latents."""
        if self.stage is StageC:
            return latent_size(self.image_px, self.image_px, self.compression)[0]
        return self.image_px // 4

    def __str__(self) -> str:
        return f"{self.name} {self.trained} {self.image_px} px, batch {self.batch}"


def published() -> list[Case]:
    """The cases of a GPU, the most telling ones first."""
    c3, c1 = ((StageC, VERSIONS[v].stage_c, f"Stage C {v}") for v in ("3.6B", "1B"))
    b3, b7 = ((StageB, VERSIONS[v].stage_b, f"Stage B {v}") for v in ("3B", "700M"))
    return [
        Case(*c3, "full", 1024, 8),
        Case(*c3, "LoRA", 1024, 8),
        Case(*b7, "full", 1024, 4),
        Case(*c3, "ControlNet", 1024, 8),
        Case(*c1, "full", 1024, 16),
        Case(*c3, "full", 1024, 16, checkpointing=1),
        Case(*c3, "full", 768, 16),
        Case(*c1, "LoRA", 1024, 16),
        Case(*b3, "full", 768, 4),
        Case(*b7, "full", 768, 8),
        Case(*c1, "ControlNet", 768, 16),
        Case(*b3, "full", 1024, 2),
    ]


def small() -> list[Case]:
    """The cases of a CPU."""
    c, b = (StageC, SMALL_C, "Stage C 17M"), (StageB, SMALL_B, "Stage B 8M")
    return [
        Case(*c, "full", 1024, 2), Case(*c, "full", 768, 4), Case(*c, "LoRA", 1024, 2),
        Case(*c, "ControlNet", 512, 2), Case(*b, "full", 384, 2), Case(*b, "full", 256, 4),
    ]  # fmt: skip


def update_flops(case: Case, network: UNet) -> int:
    """Useful FLOPs of an update of a case."""
    return case.batch * (3 if case.trained == "full" else 2) * forward_flops(network, case.positions)


# ---------------------------------------------------------------- contenders


@dataclass
class Contender:
    """A network in training: `update()` makes one."""

    update: Callable[[], None]
    there: list[Tensor]
    """What lives between updates."""


def inputs_of(case: Case, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Latents, noise levels and conditions of a batch, and what is to be predicted."""
    c = 16 if case.stage is StageC else 4
    x = torch.randn(case.batch, c, case.positions, case.positions, device=device)
    text = torch.randn(case.batch, 1, 1280, device=device)
    given = {"x": x, "r": torch.rand(case.batch, device=device)}
    if case.stage is StageC:
        given |= {
            "clip_text": torch.randn(case.batch, TEXT_TOKENS, 1280, device=device), "clip_text_pooled": text,
            "clip_img": torch.randn(case.batch, 1, 768, device=device),
        }  # fmt: skip
    else:
        side = latent_size(case.image_px, case.image_px, 32)[0]
        given |= {"effnet": torch.randn(case.batch, 16, side, side, device=device), "clip": text}
    return given, torch.randn_like(x)


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def make_ours(case: Case, technique: Technique, device: torch.device) -> Contender:
    with device:
        network = case.stage(**case.arguments).train()
        given, target = inputs_of(case, device)
        control = torch.rand(case.batch, 3, case.image_px, case.image_px) if case.trained == "ControlNet" else None
    trained: nn.Module = network
    everything = nn.ModuleList([network])
    if case.trained != "full":
        network.requires_grad_(False).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    if technique.frozen_weights:
        freeze(network, technique.frozen_weights, "frozen_weights", device)
    if case.trained == "LoRA":
        add_adapters(network, [".attn"], LoraSettings(rank=4, alpha=4))
    elif case.trained == "ControlNet":
        widths = network.residual_widths
        blocks = sorted({0, len(widths) // 8, len(widths) // 4, len(widths) - 1})
        with device:
            trained = ControlNet(c_proj=widths[0], proj_blocks=blocks).train()
        everything.append(trained)
    for layer in network.modules():
        if isinstance(layer, FeedForward):
            layer.fused = technique.fused_feed_forward
    if technique.bfloat16_weights:
        compute.keep_in_bfloat16(trained)
    if technique.fp8:
        compute.to_fp8(network, device)
    level = case.checkpointing if technique.checkpointing is None else technique.checkpointing
    network.set_activation_checkpointing(level)
    if technique.whole is not None:
        network.compile(**technique.whole)
    elif technique.compiled:
        compute.compile_blocks(network, device)
    if technique.swapped:
        BlockSwap(network, round(technique.swapped * len(swappable(network))), device)
    named = {name: p for name, p in trained.named_parameters() if p.requires_grad}
    groups = [{"params": list(named.values()), "param_names": list(named)}]
    optimizers = optim.build_optimizers(technique.optimizer, groups, lr=1e-5)
    if not technique.fused_optimizer:
        for optimizer in optimizers:
            optimizer._step_supports_amp_scaling = False  # of AdamW, the fused one alone does
            for group in optimizer.param_groups:
                group["fused"] = False
    never = torch.zeros((), device=device)
    fused = FusedBackward(optimizers, named, {}, {}) if technique.fused_backward else None

    def update() -> None:
        if technique.whole is not None:
            torch.compiler.cudagraph_mark_step_begin()  # memory of the update before may be written over
        with autocast(device):
            further = {} if control is None else {"cnet": trained(control)}
            loss = (network(**given, **further).float() - target).square().mean()
        if fused is not None:
            fused.backward(loss)
            fused.finish()
            return
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in named.values()])
        torch.nn.utils.clip_grads_with_norm_(list(named.values()), 1.0, norm)
        optim.step(optimizers, never)
        for parameter in named.values():
            parameter.grad = None

    return Contender(update, _living(everything, optimizers))


def make_theirs(case: Case, device: torch.device) -> Contender:
    from benchmarks.peers import diffusers_lora, diffusers_network, diffusers_output

    with device:
        network = diffusers_network(case.stage, case.arguments).train()
        given, target = inputs_of(case, device)
    if case.trained == "LoRA":
        network = diffusers_lora(network, torch.bfloat16 if device.type == "cuda" else torch.float32)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def update() -> None:
        with autocast(device):
            output = diffusers_output(network, given)
            loss = nn.functional.mse_loss(output.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Contender(update, _living(network, [optimizer]))


def _living(network: nn.Module, optimizers: list) -> list[Tensor]:
    """Parameters and buffers; optimizers join with their state once they have stepped."""
    return [*network.parameters(), *network.buffers(), *optimizers]


# ---------------------------------------------------------------- measuring


def turn(make: Callable[[], Contender], updates: int, device: torch.device) -> tuple[list[float], int]:
    """(seconds of each update, most bytes in use) of a contender, built for this turn and then dropped."""
    contender = make()
    tensors = [t for t in contender.there if isinstance(t, Tensor)]
    for _ in range(2):
        contender.update()
    for optimizer in (o for o in contender.there if isinstance(o, torch.optim.Optimizer)):
        tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(updates):
        _wait(device)
        began = time.perf_counter()
        contender.update()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated()
    with PeakMemory(tensors) as memory:
        contender.update()
    return seconds, memory.peak + sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def contenders(case: Case, device: torch.device, levels: bool) -> Iterator[tuple[str, Callable[[], Contender]]]:
    if case.trained != "ControlNet" and not levels:
        yield PLAIN_LOOP, lambda: make_theirs(case, device)
    for technique in techniques(device, levels):
        if case.trained in technique.cases:
            yield technique.name, lambda technique=technique: make_ours(case, technique, device)


def measure(
    case: Case,
    device: torch.device,
    turns: int,
    updates: int,
    deadline: float,
    levels: bool = False,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, tuple | str]:
    """Median seconds and most bytes by contender, or why there are none.

    deadline: `time.monotonic()` after which no turn begins. wanted: by a contender's name, whether it takes part.
    """
    made = {name: make for name, make in contenders(case, device, levels) if wanted(name)}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    results: dict[str, tuple | str] = {}
    for _ in range(turns):
        for name, make in made.items():
            late = time.monotonic() > deadline
            if late:
                results.setdefault(name, NO_TIME)
            if late or isinstance(results.get(name), str):
                continue
            try:
                torch.manual_seed(0)
                took, memory = turn(make, updates, device)
            except torch.OutOfMemoryError:
                results[name] = "out of memory"
            except (ValueError, ImportError) as error:  # what the machine cannot do, or has not installed
                results[name] = str(error)
            else:
                seconds[name] += took
                results[name] = (statistics.median(seconds[name]), memory)
            free(device)
    return results


def show(case: Case, results: dict[str, tuple | str], device: torch.device) -> None:
    with torch.device("meta"):
        flops = update_flops(case, case.stage(**case.arguments))
    peak = dense_peak(device)
    theirs = results.get(PLAIN_LOOP)
    for name, result in results.items():
        if isinstance(result, str):
            print(f"| {case} | {name} | {result} | | | | | |", flush=True)
            continue
        seconds, memory = result
        rate = flops / seconds / 1e12
        gain = f"{theirs[0] / seconds:.2f}x" if isinstance(theirs, tuple) else ""
        used = f"{rate / peak:.0%}" if peak else ""
        print(
            f"| {case} | {name} | {seconds * 1000:.0f} | {case.batch / seconds:.2f} | {gain} | {rate:.3g} | {used} "
            f"| {memory / GIB:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", default="", help="only those whose name holds this text, e.g. '3.6B full'")
    parser.add_argument("--turns", type=int, default=2, help="how often each contender is built and measured")
    parser.add_argument("--updates", type=int, default=5, help="measured updates of a turn")
    parser.add_argument("--seconds", type=float, default=450, help="no turn begins later than this")
    parser.add_argument("--levels", action="store_true", help="compare levels of activation checkpointing instead")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + options.seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kind = "bfloat16 autocast" if device.type == "cuda" else "float32"
    print(f"{where}, torch {torch.__version__}, {kind}; {options.turns} turns of {options.updates} updates, medians\n")
    print(
        "| case | contender | ms per update | samples/s | beside the plain loop | TFLOP/s | utilisation | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    left = [case for case in (published() if device.type == "cuda" else small()) if options.cases in str(case)]
    while left and time.monotonic() < deadline:
        show(
            case := left.pop(0),
            measure(case, device, options.turns, options.updates, deadline, options.levels),
            device,
        )
    for case in left:
        print(f"| {case} | {NO_TIME} | | | | | | |")


if __name__ == "__main__":
    main()
