"""What training a LoRA costs: beside parametrised weights on this machine, and in memory at the published sizes.

    python3 benchmarks/lora.py
    python3 benchmarks/lora.py --sizes

The first compares the side path of `modules.lora` with the same adapters as parametrised weights, made anew in every
forward pass, on attention layers and on a whole Stage C of the 1B's width. The second counts what an update of the
3.6B and of the 1B allocates, on PyTorch's meta device, which needs neither their weights nor a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from families.cascade.versions import VERSIONS
from modules.blocks import AttnBlock
from modules.clip import ClipSettings, ImageTower, TextTower
from modules.effnet import EfficientNetEncoder
from modules.lora import LoraSettings, adapters, add_adapters, choose, places
from modules.previewer import Previewer
from modules.quantise import BLOCK
from modules.stage_c import StageC
from warpcore.meta import PeakMemory

SETTINGS = LoraSettings(rank=4, alpha=4)
GIB, MIB = 2**30, 2**20
TOKENS = 77 + 2 * 4
"""Condition tokens of the published Stage C."""
POSITIONS_1024_PX = 24
"""Latents of a picture of 1024 px per side."""


# ---------------------------------------------------------------- beside parametrised weights


class Parametrised(nn.Module):
    """The change of a weight as the reference implementation makes it: at full size, in every forward pass."""

    def __init__(self, weight: Tensor):
        super().__init__()
        matrix = weight.flatten(1)
        self.down = nn.Parameter(torch.rand(SETTINGS.rank, matrix.shape[1]) / matrix.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(matrix.shape[0], SETTINGS.rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + SETTINGS.scale * (self.up @ self.down).view(weight.shape)


def side_path(network: nn.Module, filters: list[str]) -> None:
    add_adapters(network, filters, SETTINGS)


def parametrised(network: nn.Module, filters: list[str]) -> None:
    there = places(network)
    for name in choose(list(there), filters):
        place = there[name]
        parametrize.register_parametrization(place.layer, place.parameter, Parametrised(place.weight))


class AttentionLayers(nn.Module):
    """Attention blocks alone."""

    def __init__(self, number: int, c: int, nhead: int):
        super().__init__()
        self.blocks = nn.ModuleList(AttnBlock(c, c, nhead) for _ in range(number))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, None, None, tokens)
        return x


def update(network: nn.Module, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    network(**inputs).float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


def measure(network: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[float, int]]:
    """(seconds of the CPU, bytes above the frozen weights at the peak) of update after update."""
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    kept = 3 * sum(parameter.nbytes for parameter in trained)  # the adapters and two moments
    update(network, inputs, optimizer)
    with PeakMemory([*network.parameters(), *network.buffers(), *inputs.values()]) as memory:
        update(network, inputs, optimizer)
    while True:
        began = time.process_time()  # whatever else the machine does meanwhile
        update(network, inputs, optimizer)
        yield time.process_time() - began, memory.peak + kept


def compare(rounds: int, positions: int) -> None:
    small = VERSIONS["1B"].stage_c
    c, nhead = small["c_hidden"][0], small["nhead"][0]
    tokens = {"x": torch.randn(1, positions, positions, c), "tokens": torch.randn(1, TOKENS, c)}
    text, pooled, picture = torch.randn(1, 77, 1280), torch.randn(1, 1, 1280), torch.randn(1, 1, 768)
    conditions = {"clip_text": text, "clip_text_pooled": pooled, "clip_img": picture}
    latents = {"x": torch.randn(1, 16, positions, positions), "r": torch.rand(1)} | conditions
    few_blocks = small | {"blocks": [[1, 1], [1, 1]]}
    cases: dict[str, tuple[Callable[[], nn.Module], list[str], dict]] = {
        "4 attention layers, attention adapted": (lambda: AttentionLayers(4, c, nhead), [".attn"], tokens),
        "Stage C with 4 blocks of each kind, attention adapted": (lambda: StageC(**few_blocks), [".attn"], latents),
        "the same, all layers adapted": (lambda: StageC(**few_blocks), ["_blocks."], latents),
    }
    print(f"1B width ({c}), {positions} x {positions} positions, batch 1, rank {SETTINGS.rank}, float32, AdamW;")
    print(f"contenders alternate, medians of {rounds} updates; memory is what lives above the frozen weights\n")
    print("| case | side path CPU s | parametrised CPU s | ratio | side path MiB | parametrised MiB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for name, (make, filters, inputs) in cases.items():
        runs = []
        for adapt in (side_path, parametrised):
            torch.manual_seed(0)
            network = make().requires_grad_(False)
            adapt(network, filters)
            runs.append(measure(network, inputs))
        ours, theirs = zip(*((next(runs[0]), next(runs[1])) for _ in range(rounds)), strict=True)
        (our_s, our_b), (their_s, their_b) = (
            (statistics.median(s for s, _ in run), run[0][1]) for run in (ours, theirs)
        )
        print(
            f"| {name} | {our_s:.3f} | {their_s:.3f} | {our_s / their_s:.2f} "
            f"| {our_b / MIB:.0f} | {their_b / MIB:.0f} | {our_b / their_b:.2f} |"
        )


# ---------------------------------------------------------------- memory at the published sizes


def count_update(version: str, batch: int, checkpointing: int, positions: int = POSITIONS_1024_PX) -> dict[str, int]:
    """Bytes that an update of Stage C's LoRA takes by part, with bfloat16 weights and attention adapted at rank 4."""
    with torch.device("meta"):
        network = StageC(**VERSIONS[version].stage_c).requires_grad_(False).to(torch.bfloat16)
        add_adapters(network, [".attn"], SETTINGS)
        network.set_activation_checkpointing(checkpointing)
        inputs = {
            "x": torch.empty(batch, 16, positions, positions), "r": torch.empty(batch),
            "clip_text": torch.empty(batch, 77, 1280), "clip_text_pooled": torch.empty(batch, 1, 1280),
            "clip_img": torch.empty(batch, 1, 768),
        }  # fmt: skip
    there = [*network.parameters(), *network.buffers(), *inputs.values()]
    with as_autocast_on_cuda(), PeakMemory(there) as memory:
        update(network, inputs, None)
    trained = [parameter for _, _, adapter in adapters(network) for parameter in adapter.parameters()]
    return {
        "Stage C, frozen": sum(p.nbytes for p in network.parameters() if not p.requires_grad),
        "adapters and two moments": 3 * sum(p.nbytes for p in trained),
        "activations and gradients": memory.peak,
    }


def count_nf4(version: str) -> int:
    """Bytes of the frozen Stage C in NF4: half a byte per weight, a byte per 64 and a float per 256 x 64."""
    with torch.device("meta"):
        network = StageC(**VERSIONS[version].stage_c).to(torch.bfloat16)
    quantised = {id(layer.weight) for layer in network.modules() if type(layer) is nn.Linear}
    quantised |= {id(p) for name, p in network.named_parameters() if name.endswith("in_proj_weight")}
    total = 0
    for parameter in network.parameters():
        if id(parameter) in quantised and parameter.numel() % BLOCK == 0:
            total += parameter.numel() // 2 + parameter.numel() // 64 + parameter.numel() // BLOCK * 4
        else:
            total += parameter.nbytes
    return total


def count_others() -> dict[str, int]:
    """Bytes of the networks around Stage C, in bfloat16."""
    with torch.device("meta"):
        networks = {
            "text tower": TextTower(ClipSettings.published("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k")),
            "image tower": ImageTower(ClipSettings.published("openai/clip-vit-large-patch14")),
            "encoder": EfficientNetEncoder(),
            "previewer": Previewer(),
        }
    return {name: 2 * sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


@contextmanager
def as_autocast_on_cuda() -> Iterator[None]:
    """Norms in float32, matrix products in the weights' dtype, attention without its matrix: what CUDA would do."""
    norm, linear, conv2d = F.layer_norm, F.linear, F.conv2d

    def flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]

    replaced = {
        "layer_norm": lambda x, *rest, **named: norm(x.float(), *rest, **named),
        "linear": lambda x, weight, bias=None: linear(x.to(torch.bfloat16), weight.to(torch.bfloat16), bias),
        "conv2d": lambda x, weight, *rest: conv2d(x.to(torch.bfloat16), weight, *rest),
        "scaled_dot_product_attention": flash,
    }
    with ExitStack() as patches:
        for name, function in replaced.items():
            patches.enter_context(patch.object(F, name, function))
        yield


def sizes() -> None:
    others = count_others()
    print("Counted on the meta device: 1024 px (24 x 24 positions), rank 4 on all attention layers, AdamW, bfloat16\n")
    print("| Stage C | batch | activation_checkpointing | frozen GiB | towers, encoder, previewer GiB "
          "| adapters and moments GiB | activations and gradients GiB | sum GiB | with nf4 GiB |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for version in ("3.6B", "1B"):
        for batch in (1, 4):
            for checkpointing in (0, 3):
                parts = count_update(version, batch, checkpointing)
                around, frozen = sum(others.values()), parts["Stage C, frozen"]
                total = sum(parts.values()) + around
                cells = [frozen, around, *list(parts.values())[1:], total, total - frozen + count_nf4(version)]
                numbers = " | ".join(f"{value / GIB:.2f}" for value in cells)
                print(f"| {version} | {batch} | {checkpointing} | {numbers} |")
    print("\nAround Stage C: " + ", ".join(f"{name} {value / GIB:.2f} GiB" for name, value in others.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", action="store_true", help="count the memory of the published sizes instead")
    parser.add_argument("--rounds", type=int, default=7, help="measured updates of each contender")
    parser.add_argument("--positions", type=int, default=POSITIONS_1024_PX, help="side of the latents")
    options = parser.parse_args()
    if options.sizes:
        sizes()
    else:
        compare(options.rounds, options.positions)


if __name__ == "__main__":
    main()
