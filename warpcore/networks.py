"""What the engine can ask of a network beyond `nn.Module`, and which config keys ask for it.

`Network` is the whole of it. A network may lack parts: `check_networks`, called once at the start of a run, refuses a
config that needs what is missing; where nothing needs it, the network is trained, or used, as one piece.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import nn
from torch.distributed import ProcessGroup

from warpcore.config import Config
from warpcore.errors import UserError


class HasBlocks(Protocol):
    """Has blocks, the parts that most of its weights and activations are in.

    FSDP shards, gathers and frees them one at a time; `fp8` converts the linear layers in them; `offload: activations`
    keeps the inputs of those that are checkpointed in the CPU's memory.
    """

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """All blocks, in any order, without any inside of another. They need not be alike.

        A block is called as a module (never one of its methods), its first tensor is what it transforms. Where the
        network is `Checkpointing`, `block.checkpointed` says whether its activations are computed again. Those with a
        method `compute`, which is what is called again, can wait in the CPU's memory (`warpcore.block_swap`).
        """


@runtime_checkable
class Checkpointing(Protocol):
    """Can compute activations again in the backward pass instead of keeping them (`activation_checkpointing`)."""

    def set_activation_checkpointing(self, level: int) -> None:
        """0: keep all. 1 and 2: compute again what saves the most memory for its time. 3: every block.

        Outputs and gradients are the same at every level. May be called again with another level. The docs page of a
        family says what its levels are.
        """


@runtime_checkable
class Compiling(Protocol):
    """Can compile itself, part by part (`compile`)."""

    def compile_blocks(self, graphs: bool = False) -> None:
        """Let `torch.compile` fuse what each block computes. Called once, before the network is sharded; names of
        parameters, hooks and activation checkpointing stay as they are. `graphs` (`compile: graphs`): record CUDA
        graphs of what it computes with gradients, one for each shape."""


@runtime_checkable
class Splitting(Protocol):
    """Can compute a sample with several processes, each a part of its tokens (sequence parallelism)."""

    def split_sequence(self, group: ProcessGroup) -> None:
        """Compute with the processes of a group, which all get the same inputs, and give the same outputs. Gradients
        of parameters are such that their mean over the processes is that of one process.

        Called once, before the network is sharded. Raises ValueError where they are too many, or do not divide it.
        """


@runtime_checkable
class Initialising(Protocol):
    """Knows what its layers begin with where it has no file (`start_from_scratch`); otherwise PyTorch's defaults are
    taken."""

    def initialise_layer(self, name: str, layer: nn.Module) -> None:
        """Give the parameters of a layer, without those of layers in it, the values of the start.

        Args:
            name: that of the layer in the network. layer: like it, by itself; its values mean nothing, or are
                PyTorch's where such a layer has defaults.
        """


class Network(HasBlocks, Checkpointing, Compiling, Protocol):
    """All that training can ask of a network. Those of diffusers get it from the adapter in `families/common`."""


class HasTokens(HasBlocks, Protocol):
    """Its blocks transform tokens (B, N, C), each those that the one before it gave, in the order of `blocks`.

    Tokens are the patches of a picture, row by row; they are a block's first argument, given by its place.
    """

    token_width: int
    """C."""
    token_arguments: Mapping[str, int] | None
    """Names of the other arguments of a block that hold something for each token, tensors or tuples of them, with the
    dimension that counts tokens: 0 for (N, ...) of all samples, 1 for (B, N, ...). None: there are no tokens."""


@runtime_checkable
class CalledByMethods(Protocol):
    """Is called not by `forward` alone, which sharding and `offload: encoders` have to know."""

    forward_methods: Sequence[str]
    """Names of the other methods that use weights when called from outside, such as `encode`."""


def has_blocks(network: nn.Module) -> bool:
    """Whether a network is of the kind `HasBlocks`. From Python 3.12 on, `isinstance` does not see submodules."""
    return getattr(network, "blocks", None) is not None


def is_whole(network: nn.Module) -> bool:
    """Whether a network is a `Network`."""
    return has_blocks(network) and isinstance(network, Checkpointing) and isinstance(network, Compiling)


def split_sequence(networks: Mapping[str, nn.Module], group: ProcessGroup) -> None:
    """Let the processes of a group compute each sample together, in all networks that can.

    Raises:
        UserError: none can, or not with that many processes.
    """
    able = [network for network in networks.values() if isinstance(network, Splitting)]
    if not able:
        raise UserError("sequence_shards: no network of this script can share the tokens of a sample; remove the key")
    for network in able:
        try:
            network.split_sequence(group)
        except ValueError as error:
            raise UserError(f"sequence_shards: {error}") from error


def blocks(network: nn.Module) -> tuple[nn.Module, ...]:
    """The blocks of a network; none where it has no such parts."""
    return tuple(network.blocks) if has_blocks(network) else ()


def block_names(networks: Mapping[str, nn.Module]) -> list[str]:
    """The names of the blocks of networks, as NETWORK.NAME."""
    inner = {block for network in networks.values() for block in blocks(network)}
    return [
        f"{name}.{part}" for name, one in networks.items() for part, module in one.named_modules() if module in inner
    ]


def linear_weights(networks: Mapping[str, nn.Module]) -> set[str]:
    """The names, as NETWORK.NAME, of the matrices that linear layers of networks multiply by: their weights, the fused
    `in_proj_weight` of attention, and what is trained beside such a layer (adapters). Not those of embeddings, by kind
    or by name, nor tables of numbers, whatever their shape."""
    found = set()
    for network, module in networks.items():
        modules = dict(module.named_modules())
        for name, parameter in module.named_parameters():
            owner = name.rpartition(".")[0]
            around = [modules[owner], *(modules[part] for part in _inside(owner))]
            is_linear = any(isinstance(one, nn.Linear) or hasattr(one, "in_proj_weight") for one in around)
            if parameter.dim() == 2 and "embed" not in name and is_linear:
                found.add(f"{network}.{name}")
    return found


def convolution_weights(networks: Mapping[str, nn.Module]) -> set[str]:
    """The names, as NETWORK.NAME, of the kernels of convolutions, but for those of embeddings by name."""
    return {
        f"{network}.{name}.weight"
        for network, module in networks.items()
        for name, part in module.named_modules()
        if isinstance(part, nn.modules.conv._ConvNd) and "embed" not in name
    }


def _inside(name: str) -> list[str]:
    """The names of the modules that hold a module, but for the outermost: `a.b` and `a` of `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def has_tokens(network: nn.Module) -> bool:
    """Whether a network is of the kind `HasTokens`."""
    return getattr(network, "token_arguments", None) is not None


def forward_methods(network: nn.Module) -> tuple[str, ...]:
    """Names of the methods beside `forward` by which a network is called."""
    return tuple(network.forward_methods) if isinstance(network, CalledByMethods) else ()


def keeps_inputs(network: nn.Module) -> bool:
    """Whether a network can have checkpointed blocks, whose inputs wait for the backward pass."""
    return isinstance(network, Checkpointing) and has_blocks(network)


def check_networks(networks: Mapping[str, nn.Module], trained: Collection[str], config: Config) -> None:
    """Check that networks have what a config needs of them.

    Args:
        networks: by name. trained: the names of those that are trained.

    Raises:
        UserError: names the network, what it lacks, and the key that needs it.
    """
    if config.activation_checkpointing:
        for name in trained:
            if not isinstance(networks[name], Checkpointing):
                raise _lacks("activation_checkpointing", name, networks[name], "set_activation_checkpointing(level)")
    if config.fp8:
        for name in trained:
            if not blocks(networks[name]):
                raise _lacks("fp8", name, networks[name], "blocks with linear layers")
    name = next(iter(trained))
    if config.compile and not any(isinstance(network, Compiling) for network in networks.values()):
        raise _lacks("compile", name, networks[name], "compile_blocks()", "and so does every other network of the run")
    if config.compile == "graphs" and not any(isinstance(networks[name], Compiling) for name in trained):
        raise _lacks(
            "compile: graphs", name, networks[name], "compile_blocks()", "which trained networks need for graphs"
        )
    if "activations" in config.offload and not any(map(keeps_inputs, networks.values())):
        raise _lacks("offload: activations", name, networks[name], "blocks", "and so does every other network")


def _lacks(key: str, name: str, network: nn.Module, what: str, more: str = "") -> UserError:
    also = f", {more}" if more else ""
    return UserError(
        f"{key}: the network {name} ({type(network).__name__}) lacks {what}{also}. Remove the key, or give the "
        "network what warpcore/networks.py describes"
    )
