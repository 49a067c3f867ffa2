"""Gradients: clipping, and norms by group."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from warpcore.errors import UserError
from warpcore.patterns import searching
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
        whole = {name for name in found if name in parameters}
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
