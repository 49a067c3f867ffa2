"""Parameter groups by name: `parameter_groups` gives some parameters another learning rate or decay, or freezes them.

    parameter_groups:
      - {pattern: "*.norm*", lr_scale: 0.1, weight_decay: 0.0}
      - {pattern: "down_blocks.*", frozen: true}

Patterns are those of a shell (`fnmatch`, upper and lower case differ) for the whole name of a parameter: `*` is any
text, dots included, `?` one character, `[01]` one of those. The name is that inside its network, such as
`down_blocks.0.norm.weight`, or that with the network's name before it, such as `generator.down_blocks.0.norm.weight`.
The first pattern that matches a parameter counts; what none matches is trained as without groups. To train only some
layers, name them first and freeze the rest: `[{pattern: "*.attn2.*"}, {pattern: "*", frozen: true}]`.
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from warpcore.errors import UserError


class NamePattern(BaseModel):
    """An entry of a key that says something of parameters by name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    pattern: str
    """The names of its parameters."""

    def matches(self, name: str) -> bool:
        """Whether `NETWORK.NAME`, or NAME alone, is of the pattern."""
        return fnmatchcase(name, self.pattern) or fnmatchcase(name.partition(".")[2], self.pattern)


class ParameterGroup(NamePattern):
    """An entry of `parameter_groups`."""

    lr_scale: PositiveFloat = 1.0
    """Factor on `lr`."""
    weight_decay: NonNegativeFloat | None = None
    """Instead of the key `weight_decay`, and for vectors (norms, biases) too, which have none otherwise."""
    frozen: bool = False
    """Neither train these parameters, nor average them, nor keep them in checkpoints."""


AnyPattern = TypeVar("AnyPattern", bound=NamePattern)


def group_of(
    names: Collection[str], groups: Sequence[AnyPattern], key: str = "parameter_groups"
) -> dict[str, AnyPattern | None]:
    """The first group whose pattern matches each parameter (`NETWORK.NAME`), None where none does.

    Args:
        key: that has the groups, for the message.

    Raises:
        UserError: a pattern matches no parameter, or only those of patterns before it.
    """
    found = {name: next((group for group in groups if group.matches(name)), None) for name in names}
    for group in groups:
        if all(other is not group for other in found.values()):
            raise UserError(f"{key}: {_without_use(group, found)}")
    return found


def what_is_trained(networks: Mapping[str, nn.Module]) -> list[str]:
    """A line for each of the networks that are trained: how many of its tensors and parameters are."""
    lines = []
    for name, network in networks.items():
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
        trained = [size for size, is_trained in sizes if is_trained]
        lines.append(
            f"{name}: {len(trained):,} of {len(sizes):,} tensors are trained, {sum(trained):,} of "
            f"{sum(size for size, _ in sizes):,} parameters"
        )
    return lines


def _without_use(group: NamePattern, found: Mapping[str, NamePattern | None]) -> str:
    taken = next((other for name, other in found.items() if group.matches(name)), None)
    if taken is not None:
        return f"{group.pattern!r} matches only what {taken.pattern!r} before it matches: put it first, or remove it"
    short = [name.partition(".")[2] for name in found]
    near = difflib.get_close_matches(group.pattern.replace("*", ""), short, n=3, cutoff=0.3) or short[:3]
    return f"{group.pattern!r} matches no parameter that is trained; there are {', '.join(near)}, ..."


def freeze(networks: Mapping[str, nn.Module], groups: Sequence[ParameterGroup]) -> None:
    """Freeze the parameters of the trained `networks` whose group says so.

    Raises:
        UserError: see `group_of`; or nothing is left to train.
    """
    trained = {
        f"{network}.{name}": parameter
        for network, module in networks.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    for name, group in group_of(trained, groups).items():
        trained[name].requires_grad_(group is None or not group.frozen)
    if groups and not any(parameter.requires_grad for parameter in trained.values()):
        raise UserError(
            "parameter_groups: every parameter is frozen; name those to train before the pattern for the rest"
        )


def optimizer_groups(
    trainable: Mapping[str, dict], parameters: Mapping[str, Tensor], groups: Sequence[ParameterGroup]
) -> list[dict]:
    """Groups for `warpcore.optim.build_optimizers`: one for each trained network, and in it for each pattern.

    Args:
        trainable: names of networks with settings of their group.
        parameters: those that are trained, as `NETWORK.NAME`.
        groups: those of the config; frozen ones have no parameters here.
    """
    trained = [group for group in groups if not group.frozen]
    found = group_of(parameters, trained)
    made = []
    for network, settings in trainable.items():
        own = [name for name in parameters if name.startswith(f"{network}.")]
        for group in (None, *trained):
            names = [name for name in own if found[name] is group]
            if names or group is None:
                params = {"params": [parameters[name] for name in names], "param_names": names}
                made.append(params | settings | _settings_of(group, settings))
    return made


def _settings_of(group: ParameterGroup | None, of_network: Mapping) -> dict:
    if group is None:
        return {}
    scale = {"lr_scale": group.lr_scale * of_network.get("lr_scale", 1.0), "pattern": group.pattern}
    return scale if group.weight_decay is None else scale | {"weight_decay": group.weight_decay}
