"""Where a run's networks live and how they compute: on the device, spread over processes, or in the CPU's memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from warpcore import compute
from warpcore.block_swap import BlockSwap
from warpcore.config import Config
from warpcore.ema import EMA, PowerProfile
from warpcore.errors import UserError
from warpcore.loading import load_deferred
from warpcore.networks import Compiling, blocks, forward_methods, has_blocks, keeps_inputs
from warpcore.offload import OnDemand, keep_inputs_on_cpu
from warpcore.statistics import has_batch_norms


@dataclass(frozen=True)
class Placement:
    """Brings networks to where they live.

    dtype: what they compute in. mesh: of the processes (replicas x shards); None for one process alone.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    mesh: DeviceMesh | None
    block_swaps: dict[str, BlockSwap] = field(default_factory=dict)
    """What became of the networks of which blocks wait, by name."""

    def place_trained(self, name: str, network: nn.Module, swapped: int = 0) -> None:
        """Prepare a network for training, and bring it to where it lives.

        swapped: how many blocks wait in the CPU's memory.

        Raises:
            UserError: the config asks for what it cannot do.
        """
        config = self.config
        if config.weights_dtype == "bfloat16":
            if has_batch_norms(network):
                raise UserError(f"weights_dtype: {name} has batch norms, which want float32; remove the key")
            compute.keep_in_bfloat16(network)
        if config.fp8:
            compute.to_fp8(network, self.device)
        if config.activation_checkpointing:
            network.set_activation_checkpointing(config.activation_checkpointing)
        self._adapt(network, graphs=config.compile == "graphs")
        if self.mesh is None or swapped:
            self._bring(name, network, swapped)
            return
        # Inputs keep their precision: a timestep rounded to bfloat16 is another timestep.
        # Batch norms want their weights in float32; gradients are added up in float32, as in one process.
        whole = self.dtype == torch.float32 or has_batch_norms(network)
        policy = MixedPrecisionPolicy(
            param_dtype=None if whole else self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        self._shard(network, policy)

    def place_frozen(self, name: str, network: nn.Module, swapped: int = 0) -> OnDemand | None:
        """Freeze a network and bring it to where it lives; the result keeps one that comes to the device on demand.

        swapped: how many blocks wait in the CPU's memory; the others are then on the device.

        Raises:
            UserError: the config asks for what it cannot do.
        """
        network.eval().requires_grad_(False).to(self.dtype)
        self._adapt(network, graphs=False)  # it may compute what outlives a micro-batch, such as remembered texts
        if self.mesh is not None and self.config.use_fsdp and has_blocks(network) and not swapped:
            self._shard(network, MixedPrecisionPolicy(cast_forward_inputs=False))
            return None
        if "encoders" in self.config.offload and not swapped:
            load_deferred(network, "cpu")
            return OnDemand(network, self.device)
        self._bring(name, network, swapped)
        return None

    def _bring(self, name: str, network: nn.Module, swapped: int) -> None:
        """To the device, whole or but for the blocks that wait."""
        if not swapped:
            load_deferred(network, self.device)
            network.to(self.device)
            return
        if self.mesh is not None:
            raise UserError(
                "swap_blocks: blocks wait for one process alone; over several, write use_fsdp: true instead, which "
                "shards them"
            )
        self.block_swaps[name] = BlockSwap(network, swapped, self.device)

    def _adapt(self, network: nn.Module, graphs: bool) -> None:
        if self.config.compile and isinstance(network, Compiling):
            compute.compile_blocks(network, self.device, graphs)
        if "activations" in self.config.offload and keeps_inputs(network):
            keep_inputs_on_cpu(network)

    def _shard(self, network: nn.Module, policy: MixedPrecisionPolicy) -> None:
        """Spread the parameters over the processes, gathered again block by block as they are used.

        Those without values yet get them afterwards, each process its rows. Others come to the device block by block,
        so a network that is too large for it may pass through.
        """
        for parameter in network.parameters():  # sharding wants plain memory order
            parameter.data = parameter.data.contiguous()
        on_cpu = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        offload = on_cpu if self.config.fsdp_cpu_offload else OffloadPolicy()
        for part in (*blocks(network), network):
            fully_shard(part, mesh=self.mesh, mp_policy=policy, offload_policy=offload)
        for method in forward_methods(network):
            register_fsdp_forward_method(network, method)
        load_deferred(network, "cpu" if self.config.fsdp_cpu_offload else self.device)


def averages(trained: Mapping[str, nn.Module], config: Config) -> dict[str, EMA]:
    """The averages of the networks that are trained, if the config asks for them."""
    if config.ema_start_iters is None:
        return {}
    device = "cpu" if config.ema_device == "cpu" else None
    power = PowerProfile(config.ema_rate, config.ema_iteration_shift) if config.ema_profile == "power" else None
    settings = {"start": config.ema_start_iters, "every": config.ema_iters, "beta": power or config.ema_beta}
    return {name: EMA(network, **settings, device=device) for name, network in trained.items()}
