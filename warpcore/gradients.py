"""Gradients: clipping, keeping the largest, and norms and means by group."""

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from warpcore.errors import UserError
from warpcore.patterns import searching
from warpcore.processes import Processes
from warpcore.sharded import full


def clip_gradients(parameters: Iterable[Tensor], largest_norm: float | None) -> Tensor:
    """The norm (0-d) of all gradients together, which are then scaled down to `largest_norm` if it is greater.

    It is where the gradients are: with offloaded parameters, on the CPU.
    """
    parameters = list(parameters)
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if largest_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest_norm, norm)
    return norm


def tensor_limits(parameters: Sequence[Tensor], largest_norm: float | None) -> dict[Tensor, float]:
    """The largest norm of the gradient of each parameter, so that all together are at most `largest_norm`.

    Each has the root of its share of all numbers. Nothing where there is no largest norm.
    """
    count = sum(parameter.numel() for parameter in parameters)
    if largest_norm is None:
        return {}
    return {parameter: largest_norm * math.sqrt(parameter.numel() / count) for parameter in parameters}


def clip_tensor(parameter: Tensor, largest_norm: float | None) -> Tensor:
    """The norm (0-d) of one parameter's gradient, which is then scaled down to `largest_norm` if it is greater."""
    return clip_gradients([parameter], largest_norm)


def clipped(
    parameters: Sequence[Tensor],
    largest_norm: float | None,
    largest_tensor_norm: float | None,
    norm_groups: Mapping[str, list["Part"]],
    mean_groups: Mapping[str, list[Tensor]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clip all gradients together, or (`largest_tensor_norm`) each to its `tensor_limits`.

    Returns their norm before that, and what is reported of groups: means before, and norms after it. All are 0-d.
    """
    means = {f"grad_mean/{name}": value for name, value in gradient_means(mean_groups).items()}
    norm = clip_gradients(parameters, largest_norm)
    for parameter, limit in tensor_limits(parameters, largest_tensor_norm).items():
        if parameter.grad is not None:
            clip_tensor(parameter, limit)
    return norm, {f"grad_norm/{name}": value for name, value in gradient_norms(norm_groups).items()} | means


def synchronise(networks: Iterable[nn.Module], processes: Processes, now: bool) -> None:
    """Whether the next backward pass of networks that several processes train adds up their gradients.

    Of sharded networks, shards of gradients are added up in every micro-batch, or each process would keep whole ones;
    over replicas, that waits for the last, which comes `now`.
    """
    sharded = processes.mesh.size(1) > 1
    for network in networks:
        (network.set_requires_all_reduce if sharded else network.set_requires_gradient_sync)(now)


@torch.no_grad()
def keep_largest(parameters: Sequence[Tensor], share: float | None) -> None:
    """Of all gradients together, keep the share that is largest in size, and set the others to zero, in place.

    Those below the quantile 1 - share (with linear interpolation) become zero: one threshold for all. It takes memory
    for one more copy of these gradients; the host waits for nothing.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    sizes = torch.cat([gradient.flatten() for gradient in gradients]).abs_()
    dropped = math.ceil(round((1 - share) * (sizes.numel() - 1), 6))
    least = sizes.kthvalue(dropped + 1).values
    for gradient in gradients:
        gradient.masked_fill_(gradient.abs() < least, 0)


def named_by(named_parameters: Mapping[str, Tensor], pattern: str, key: str) -> dict[str, Tensor]:
    """The parameters whose names a regular expression finds (`re.search`).

    Args:
        key: of the config that has the expression, for the message.

    Raises:
        UserError: it takes too long, or finds no parameter.
    """
    with searching(key):
        found = {name: parameter for name, parameter in named_parameters.items() if re.search(pattern, name)}
    if not found:
        near = ", ".join(difflib.get_close_matches(pattern.replace("\\", ""), list(named_parameters), n=4, cutoff=0.0))
        raise UserError(f"{key}: {pattern!r} finds no parameter that is trained; near names: {near}")
    return found


def mean_groups(
    parameters: Mapping[str, Tensor], patterns: Mapping[str, str], block_names: Sequence[str] = ()
) -> dict[str, list[Tensor]]:
    """The parameters of which `gradient_means` adds up means: by a group's name, and by GROUP/BLOCK those in a block.

    Args:
        parameters: those that are trained, as `NETWORK.NAME`.
        patterns: a regular expression on those names for each group.
        block_names: of the blocks of networks, as `NETWORK.NAME`.

    Raises:
        UserError: an expression takes too long, or finds no parameter.
    """
    groups = {}
    for group, pattern in patterns.items():
        found = named_by(parameters, pattern, f"grad_mean_groups: {group}")
        groups[group] = list(found.values())
        for block in block_names:
            inside = [parameter for name, parameter in found.items() if name.startswith(f"{block}.")]
            groups |= {f"{group}/{block}": inside} if inside else {}
    return groups


@torch.no_grad()
def gradient_means(groups: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """The sum over each group's parameters of the mean absolute value of their gradients, as 0-d tensors.

    As in `gradient_norms`, nothing is read back, and with shards all processes call it together.
    """
    means = {}
    for group, parameters in groups.items():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        sums = [full(one).float() for one in torch._foreach_norm(gradients, 1)] if gradients else []
        of_each = torch._foreach_div(sums, [float(gradient.numel()) for gradient in gradients]) if sums else []
        means[group] = torch.stack(of_each).sum() if of_each else torch.zeros((), device=parameters[0].device)
    return means


@dataclass(frozen=True, slots=True)
class Part:
    """A parameter whose gradient is measured: all of it, or one third of its rows (0, 1, 2: queries, keys, values)."""

    parameter: Tensor
    third: int | None = None


def gradient_groups(
    named_parameters: Iterable[tuple[str, Tensor]], patterns: Mapping[str, str]
) -> dict[str, list[Part]]:
    """The parameters whose names a group's regular expression finds (`re.search`).

    A fused projection `X.in_proj_weight` also has the names `X.in_proj_weight.q`, `.k` and `.v`: thirds of its rows.

    Raises:
        UserError: an expression isn't valid, takes too long, or finds no parameter.
    """
    parameters = dict(named_parameters)
    names = list(parameters)
    names += [f"{name}.{third}" for name in parameters if name.endswith("in_proj_weight") for third in "qkv"]
    groups = {}
    for group, pattern in patterns.items():
        try:
            with searching(f"grad_norm_groups: {group}"):
                found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"gradient norm group {group!r}: {pattern!r} is no regular expression: {error}") from error
        if not found:
            near = ", ".join(difflib.get_close_matches(pattern.replace("\\", ""), names, n=4, cutoff=0.0))
            raise UserError(f"gradient norm group {group!r}: {pattern!r} finds no parameter; near names: {near}")
        whole = [name for name in found if name in parameters]
        groups[group] = [Part(parameters[name]) for name in whole] + [
            Part(parameters[name[:-2]], "qkv".index(name[-1]))
            for name in found
            if name not in parameters and name[:-2] not in whole
        ]
    return groups


@torch.no_grad()
def gradient_norms(groups: Mapping[str, list[Part]]) -> dict[str, Tensor]:
    """The Euclidean norm of each group's gradients over all shards, as 0-d tensors on the device.

    Nothing is read back to the host, but with shards all processes have to call it together. Parameters without
    a gradient count as zero.
    """
    norms = {}
    for group, parts in groups.items():
        gradients = [part.parameter.grad for part in parts if part.third is None and part.parameter.grad is not None]
        pieces = [full(torch.nn.utils.get_total_norm(gradients)).float()] if gradients else []
        for part in parts:
            if part.third is not None and part.parameter.grad is not None:
                rows = full(torch.linalg.vector_norm(part.parameter.grad, dim=1, dtype=torch.float32))
                pieces.append(torch.linalg.vector_norm(rows.chunk(3)[part.third]))
        zero = torch.zeros((), device=parts[0].parameter.device)
        norms[group] = torch.linalg.vector_norm(torch.stack(pieces)) if pieces else zero
    return norms
