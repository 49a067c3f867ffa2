"""How networks compute where a config asks for more than the plain way: compiled, in fp8, with bfloat16 weights."""

import shutil
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._triton import has_triton

from warpcore.config import Config
from warpcore.errors import ConfigError, UserError
from warpcore.networks import Compiling, blocks

COMPILED_VARIANTS = 64
"""Compiled variants of a block: kinds of layers, widths, training, evaluation. Beyond PyTorch's 8, more stay plain."""
GRAPH_VARIANTS = 1024
"""With CUDA graphs, which have fixed shapes, each of those variants once per bucket."""


def check_graphs(config: Config, device: torch.device, sharded: bool) -> None:
    """Check that `compile: graphs`, if the config has it, can work: graphs read and write fixed addresses of one GPU.

    Raises:
        ConfigError: names what stands against it.
    """
    if config.compile != "graphs":
        return
    instead = "write compile: blocks"
    if device.type != "cuda":
        raise ConfigError(
            f"compile: graphs are CUDA graphs, which need an NVIDIA GPU, not {device.type.upper()}; {instead}"
        )
    if sharded:
        raise ConfigError(
            "compile: graphs needs weights that stay where they are, but FSDP (several processes, or "
            f"fsdp_cpu_offload) gathers them somewhere else each time; {instead}, or train with one process"
        )
    if config.offload:
        raise ConfigError(
            f"compile: graphs needs memory that stays where it is, but offload: {list(config.offload)} brings it back "
            f"somewhere else; {instead}, or remove offload"
        )


def begin_graphs(parameters: Iterable[Tensor], accumulated: bool) -> None:
    """Tell CUDA graphs that a micro-batch begins: what they computed in the one before may be written over.

    parameters: the trained ones. accumulated: the micro-batch before was the first of this update; its gradients,
    which lie in the graphs' memory, are copied, so that those to come are added to them.
    """
    for parameter in parameters if accumulated else ():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()
    torch.compiler.cudagraph_mark_step_begin()


def compile_blocks(network: Compiling, device: torch.device, graphs: bool = False) -> None:
    """Compile what a network offers to (`compile_blocks`), each variant when it is first used.

    graphs: record CUDA graphs of what it computes in training, one for each shape; see `check_graphs`, `begin_graphs`.
    This has never run on a GPU: tests only check what is asked of PyTorch.

    Raises:
        UserError: there is no compiler.
    """
    if device.type == "cuda" and not has_triton():
        raise UserError("compile: needs Triton on CUDA: pip install triton, or remove the key")
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise UserError("compile: needs a C++ compiler on the CPU: install g++, or remove the key")
    torch._dynamo.config.recompile_limit = GRAPH_VARIANTS if graphs else COMPILED_VARIANTS
    if graphs:
        torch._dynamo.config.accumulated_recompile_limit = GRAPH_VARIANTS
    # A checkpointed block must find in the backward pass the code that it ran: variants are tried in a fixed order
    # (https://github.com/pytorch/pytorch/issues/166926).
    torch._C._dynamo.eval_frame._set_lru_cache(False)
    network.compile_blocks(graphs)


def to_fp8(network: nn.Module, device: torch.device, emulate: bool = False) -> list[str]:
    """Let the linear layers in a network's blocks multiply in fp8, each tensor scaled as it is used (torchao).

    emulate: compute what fp8 would give without the hardware, slowly. Returns the names of the layers.

    Raises:
        UserError: the GPU, or the package, cannot.
    """
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    if not able and not emulate:
        here = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
        raise UserError(f"fp8: needs a GPU that multiplies in fp8 (Ada, Hopper or later), not {here}; remove the key")
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError("fp8: needs torchao: pip install torchao") from error
    inside = {layer for block in blocks(network) for layer in block.modules()}
    names = [
        name for name, layer in network.named_modules()
        if type(layer) is nn.Linear and layer in inside and not any(side % 16 for side in layer.weight.shape)
    ]  # fmt: skip
    if not names:
        raise UserError("fp8: the network has no linear layers in blocks, with sides that 16 divides; remove the key")
    chosen = set(names)
    convert_to_float8_training(
        network,
        config=Float8LinearConfig(pad_inner_dim=True, emulate=emulate),
        module_filter_fn=lambda _, name: name in chosen,
    )
    return names


def keep_in_bfloat16(network: nn.Module) -> None:
    """Keep the parameters that are trained in bfloat16; frozen ones and buffers stay as they are."""
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
