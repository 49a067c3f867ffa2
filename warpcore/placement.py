"""Where a run's networks live and how they compute: on the device, spread over processes, or in the CPU's memory."""

from typing import TYPE_CHECKING

from torch import float32, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from warpcore import compute
from warpcore.ema import EMA
from warpcore.errors import UserError
from warpcore.networks import Compiling, HasBlocks, blocks, forward_methods, keeps_inputs
from warpcore.offload import OnDemand, keep_inputs_on_cpu
from warpcore.statistics import has_batch_norms

if TYPE_CHECKING:
    from warpcore.core import WarpCore


def place(run: "WarpCore", name: str) -> None:
    """Freeze a network, or prepare it for training, and bring it to where it lives."""
    network = run.networks[name]
    if name in run.trainable:
        _prepare(run, name, network)
    else:
        network.eval().requires_grad_(False).to(run.dtype)
    if run.config.compile and isinstance(network, Compiling):
        # Frozen networks may compute what outlives a micro-batch, such as remembered texts.
        graphs = run.config.compile == "graphs" and name in run.trainable
        compute.compile_blocks(network, run.device, graphs)
    if "activations" in run.config.offload and keeps_inputs(network):
        keep_inputs_on_cpu(network)
    if name in run.trainable and run.processes.mesh is not None:
        # Inputs keep their precision: a timestep rounded to bfloat16 is another timestep.
        # Batch norms want their weights in float32; gradients are added up in float32, as in one process.
        whole = run.dtype == float32 or has_batch_norms(network)
        policy = MixedPrecisionPolicy(
            param_dtype=None if whole else run.dtype,
            reduce_dtype=float32,
            cast_forward_inputs=False,
        )
        _shard(run, network, policy)
    elif run.processes.mesh is not None and run.config.use_fsdp and isinstance(network, HasBlocks):
        _shard(run, network, MixedPrecisionPolicy(cast_forward_inputs=False))
    elif name not in run.trainable and "encoders" in run.config.offload:
        run.on_demand[name] = OnDemand(network, run.device)
    else:
        network.to(run.device)


def _prepare(run: "WarpCore", name: str, network: nn.Module) -> None:
    if run.config.weights_dtype == "bfloat16":
        if has_batch_norms(network):
            raise UserError(f"weights_dtype: {name} has batch norms, which want float32; remove the key")
        compute.keep_in_bfloat16(network)
    if run.config.fp8:
        compute.to_fp8(network, run.device)
    if run.config.activation_checkpointing:
        network.set_activation_checkpointing(run.config.activation_checkpointing)


def _shard(run: "WarpCore", network: nn.Module, policy: MixedPrecisionPolicy) -> None:
    """Spread the parameters over the processes, gathered again block by block as they are used.

    They come to the device block by block, too, so a network that is too large for it may pass through.
    """
    for parameter in network.parameters():  # sharding wants plain memory order
        parameter.data = parameter.data.contiguous()
    on_cpu = CPUOffloadPolicy(pin_memory=run.device.type == "cuda")
    offload = on_cpu if run.config.fsdp_cpu_offload else OffloadPolicy()
    for part in (*blocks(network), network):
        fully_shard(part, mesh=run.processes.mesh, mp_policy=policy, offload_policy=offload)
    for method in forward_methods(network):
        register_fsdp_forward_method(network, method)


def averages(run: "WarpCore") -> dict[str, EMA]:
    """The averages of the networks that are trained, if the config asks for them."""
    config = run.config
    if config.ema_start_iters is None:
        return {}
    device = "cpu" if config.ema_device == "cpu" else None
    return {
        name: EMA(run.networks[name], start=config.ema_start_iters, every=config.ema_iters, beta=config.ema_beta,
                  device=device)
        for name in run.trainable
    }  # fmt: skip
