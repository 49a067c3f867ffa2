"""Optimizers: building them, a step of all of them, and their state.

The engine holds a list of optimizers (Muon brings AdamW along for the tensors it can't take). Parameter groups carry
`param_names`, and everything saved is keyed by those names, so a checkpoint doesn't depend on the order of parameters.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from warpcore.bfloat16 import Stochastic, StochasticAdamW
from warpcore.errors import UserError
from warpcore.optimizers.came import CAME
from warpcore.optimizers.lion import Lion
from warpcore.optimizers.muon import KernelMuon, Muon
from warpcore.optimizers.prodigy import Prodigy

# Entries of a parameter group that the config and the device decide. They aren't saved: a resumed run follows its
# config. All others (such as schedulefree's counters) are progress of the optimizer, and are.
_SETTINGS = {
    *("params", "param_names", "lr", "lr_scale", "betas", "eps", "weight_decay", "momentum", "nesterov"),
    *("ns_coefficients", "ns_steps", "adjust_lr_fn", "beta2_decay", "d", "r", "warmup_steps", "weight_lr_power"),
    *("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"),
    *("alpha", "t_alpha", "t_beta3", "initial_lr"),
}


def supports_dtensor(name: str) -> bool:
    """Whether the optimizer can step on parameters that are sharded over processes.

    Raises:
        UserError: no optimizer has this name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer: {name!r} is unknown; write one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name].supports_dtensor


def build_optimizers(
    name: str,
    groups: list[dict],
    *,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    linear: Collection[str] | None = None,
    convolutions: Collection[str] = (),
) -> list[Optimizer]:
    """The optimizers of a run: one, or up to three for `muon`.

    Weight decay applies to matrices and kernels (two dimensions longer than 1), and to norms, biases and scales only
    where their group has its own. `muon` takes the weights of linear layers (no embeddings, no tables), with rates
    matched to AdamW's (arXiv:2502.16982, section 2.2), AdamW the rest. For `adafactor`, `lr` is the largest step
    relative to a tensor's RMS, and `betas` and `eps` have no effect. `schedulefree` wants `train_mode` before steps
    and `eval_mode` before sampling. `lion` has no `eps`, and wants 3 to 10 times less `lr` than AdamW. `prodigy` finds
    the learning rate itself: `lr` is a factor on it, 1 as a rule. `came` has no `eps`, and wants a warm-up. bfloat16
    parameters are stepped with stochastic rounding.

    Args:
        name: one of `OPTIMIZERS`.
        groups: torch parameter groups: "params", "param_names" (unique over all groups), and optionally "lr_scale", a
            factor on the learning rate (see `set_lr`), "weight_decay", then for vectors too, and "pattern", what the
            group is known by in a checkpoint.
        linear: the names of the weights of linear layers (`warpcore.networks.linear_weights`); without it, all 2-D
            parameters count as such, but for those whose names say `embed`.
        convolutions: the names of kernels that `muon` takes as well (`warpcore.networks.convolution_weights`).

    Raises:
        UserError: unknown name, package not installed, or an optimizer that can't take sharded parameters.
    """
    sharded = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
    if not supports_dtensor(name) and sharded:
        able = ", ".join(other for other in OPTIMIZERS if supports_dtensor(other))
        raise UserError(f"optimizer: {name} can't train a network that is sharded over processes; write one of {able}")
    names = [parameter_name for group in groups for parameter_name in group["param_names"]]
    assert len(set(names)) == len(names), "parameter names must be unique over all groups"
    matrices, vectors = _split(groups, lambda _, parameter: parameter.ndim >= 2)
    undecayed = [{**group, "weight_decay": group.get("weight_decay", 0.0)} for group in vectors]
    settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    if name == "muon":
        built = _muon(matrices, undecayed, settings, linear, convolutions)
    else:
        built = OPTIMIZERS[name].build(matrices, undecayed, settings)
    return [Stochastic(one) if _rounds(one) else one for one in built]


def _rounds(optimizer: Optimizer) -> bool:
    """Whether it would round most steps of its bfloat16 parameters away."""
    return _in_bfloat16(optimizer.param_groups) and not isinstance(optimizer, StochasticAdamW | Prodigy)


def _in_bfloat16(groups: Iterable[dict]) -> bool:
    return any(parameter.dtype == torch.bfloat16 for group in groups for parameter in group["params"])


def _adamw(matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    groups = matrices + vectors
    if _in_bfloat16(groups):
        return [StochasticAdamW(groups, **settings)]
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    return [torch.optim.AdamW(groups, fused=kinds <= {"cuda", "cpu"}, **settings)] if groups else []


def _adamw8bit(matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    return [_package("bitsandbytes", "adamw8bit").optim.AdamW8bit(matrices + vectors, **settings)]


def _adafactor(matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    return [torch.optim.Adafactor(matrices + vectors, lr=settings["lr"], weight_decay=settings["weight_decay"])]


def _schedulefree(matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    return [_package("schedulefree", "schedulefree").AdamWScheduleFree(matrices + vectors, **settings)]


def _muon(
    matrices: list[dict],
    vectors: list[dict],
    settings: dict,
    linear: Collection[str] | None = None,
    convolutions: Collection[str] = (),
) -> list[Optimizer]:
    hidden, others = _split(matrices, _is_2d if linear is None else lambda name, _: name in linear)
    kernels, others = _split(others, lambda name, _: name in convolutions)
    own = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    return [
        *([Muon(hidden, **own)] if hidden else []),
        *([KernelMuon(kernels, **own)] if kernels else []),
        *_adamw(others, vectors, settings),
    ]


def _without_eps(kind: type[Optimizer], matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    return [kind(matrices + vectors, **{key: value for key, value in settings.items() if key != "eps"})]


def _prodigy(matrices: list[dict], vectors: list[dict], settings: dict) -> list[Optimizer]:
    return [Prodigy(matrices + vectors, **settings)]


class OptimizerKind(NamedTuple):
    build: Callable[[list[dict], list[dict], dict], list[Optimizer]]
    """Of the groups of matrices, those of vectors, and the settings `lr`, `weight_decay`, `betas` and `eps`."""
    supports_dtensor: bool = True
    """Whether it can step on DTensors, parameters that are sharded over processes."""


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw),
    "adamw8bit": OptimizerKind(_adamw8bit, supports_dtensor=False),  # bitsandbytes' kernels read raw memory
    "adafactor": OptimizerKind(_adafactor, supports_dtensor=False),  # squares norms in place, which DTensor refuses
    "schedulefree": OptimizerKind(_schedulefree),
    "muon": OptimizerKind(_muon),
    "lion": OptimizerKind(partial(_without_eps, Lion)),
    "prodigy": OptimizerKind(_prodigy),
    "came": OptimizerKind(partial(_without_eps, CAME)),
}


def _split(groups: list[dict], test) -> tuple[list[dict], list[dict]]:
    """The groups with the parameters that pass test(name, parameter), and with the others; empty groups left out."""
    halves: tuple[list[dict], list[dict]] = ([], [])
    for group in groups:
        named = list(zip(group["param_names"], group["params"], strict=True))
        for half, passes in zip(halves, (True, False), strict=True):
            chosen = [(name, parameter) for name, parameter in named if test(name, parameter) == passes]
            if chosen:
                names, parameters = zip(*chosen, strict=True)
                half.append({**group, "params": list(parameters), "param_names": list(names)})
    return halves


def _is_2d(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 2 and "embed" not in name


def _package(package: str, optimizer: str):
    try:
        return __import__(package)
    except ImportError as error:
        raise UserError(f"optimizer: {optimizer} needs a package: run `pip install {package}`") from error


def set_lr(optimizers: Iterable[Optimizer], lr: float) -> None:
    """Sets the learning rate of every group to `lr` times the group's "lr_scale" (1 where absent)."""
    for group in _groups(optimizers):
        group["lr"] = lr * group.get("lr_scale", 1.0)


def metrics(optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """What optimizers found that a user wants to see (0-d, on the device): Prodigy's estimate of the learning rate."""
    return {f"{type(one).__name__.lower()}_d": one.d.clone() for one in optimizers if isinstance(one, Prodigy)}


@torch.no_grad()
def train_mode(optimizers: Iterable[Optimizer]) -> None:
    """Puts the weights where training goes on, bit for bit. Only schedule-free optimizers hold two sets of weights."""
    for optimizer in optimizers:
        if hasattr(optimizer, "train"):
            optimizer.train()
            for parameter, before in optimizer.__dict__.pop("_before_eval", {}).items():
                parameter.copy_(before)


@torch.no_grad()
def eval_mode(optimizers: Iterable[Optimizer]) -> None:
    """Puts in the weights that are meant for use: sampling, validation and the files people take away.

    A schedule-free optimizer's own way back to training rounds, which would make a run depend on when it sampled, so a
    copy of the weights is kept until `train_mode`.
    """
    for optimizer in optimizers:
        if hasattr(optimizer, "eval"):
            if "_before_eval" not in optimizer.__dict__:
                optimizer._before_eval = {
                    parameter: parameter.clone() for parameter in _parameters(optimizer).values()
                }
            optimizer.eval()


def step(optimizers: Iterable[Optimizer], found_inf: Tensor) -> None:
    """Steps all optimizers, or none where `found_inf` (one element, not 0: skip) says that gradients aren't finite.

    A skipped step leaves weights and state bit for bit as they are. Fused AdamW decides on the device; the others cost
    one read of `found_inf` by the host.
    """
    found_inf = (found_inf.detach() != 0).float().reshape(())
    skip: bool | None = None
    for optimizer in optimizers:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # The protocol of torch.amp.GradScaler: kernels return early where found_inf is 1.
            # Kernels on the CPU read it at once, and AdamW's own copy from a GPU would not have arrived by then.
            there = optimizer.param_groups[0]["params"][0].device
            optimizer.grad_scale, optimizer.found_inf = None, found_inf.to(there)
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        else:
            skip = bool(found_inf.item()) if skip is None else skip
            if not skip:
                optimizer.step()


def optimizer_state(optimizers: Iterable[Optimizer]) -> tuple[dict[str, Tensor], dict]:
    """What the optimizers have learnt: tensors under "{parameter}.{state key}", and the rest as JSON-able values."""
    optimizers = list(optimizers)
    tensors, values = {}, {}
    for optimizer in optimizers:
        for name, parameter in _parameters(optimizer).items():
            for key, value in optimizer.state.get(parameter, {}).items():
                (tensors if isinstance(value, Tensor) else values)[f"{name}.{key}"] = value
    groups = [[_progress(group) for group in optimizer.param_groups] for optimizer in optimizers]
    return tensors, {"optimizers": _class_names(optimizers), "values": values, "groups": groups}


def allocate_optimizer_state(
    optimizers: Iterable[Optimizer], stored: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> dict[str, Tensor]:
    """The optimizers' own state tensors, ready to be loaded into; their values mean nothing until then.

    The optimizers make them in a step at learning rate 0, so each has the type, device and sharding it trains with.

    Args:
        stored: shape and type of each stored tensor, by "{parameter}.{state key}".

    Raises:
        UserError: the stored state is of another optimizer or another set of parameters.
    """
    optimizers = list(optimizers)
    with_state = {name.rpartition(".")[0] for name in stored}
    for optimizer in optimizers:
        _make_state(optimizer, with_state)
    tensors, _ = optimizer_state(optimizers)
    tensors = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] in with_state}
    for key in sorted(tensors.keys() ^ stored.keys()):
        where = "the optimizer has no place for" if key in stored else "the checkpoint lacks"
        raise UserError(f"optimizer state: {where} {key!r}; resume with the optimizer and network that were saved")
    for key, tensor in tensors.items():
        shape, dtype = stored[key]
        if (tuple(tensor.shape), tensor.dtype) != (tuple(shape), dtype):
            raise UserError(
                f"optimizer state: {key!r} is {dtype} {tuple(shape)} in the checkpoint, but {tensor.dtype} "
                f"{tuple(tensor.shape)} here; resume with the optimizer and network that were saved"
            )
    return tensors


def load_optimizer_state(optimizers: Iterable[Optimizer], tensors: Mapping[str, Tensor], rest: dict) -> None:
    """Restores what `optimizer_state` gave, bit for bit. `tensors` may be those of `allocate_optimizer_state`.

    Learning rate, weight decay and betas stay as configured.

    Raises:
        UserError: the state is of another optimizer or another set of parameters.
    """
    optimizers = list(optimizers)
    check_same_optimizers(optimizers, rest)
    stored = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
    for key, own in allocate_optimizer_state(optimizers, stored).items():
        if own is not tensors[key]:
            own.copy_(tensors[key])
    for optimizer, groups in zip(optimizers, rest["groups"], strict=True):
        for group, progress in zip(optimizer.param_groups, groups, strict=True):
            group.update(progress)
        parameters = _parameters(optimizer)
        for key, value in rest["values"].items():
            name, _, state_key = key.rpartition(".")
            if name in parameters:
                if isinstance(optimizer.state[parameters[name]].get(state_key), Tensor):
                    raise UserError(f"optimizer state: {key!r} is no tensor in the checkpoint")
                optimizer.state[parameters[name]][state_key] = value


def check_same_optimizers(optimizers: Iterable[Optimizer], rest: dict) -> None:
    """Raises UserError, which names the key, where the JSON-able state is of other optimizers, or of other groups."""
    optimizers = list(optimizers)
    saved, here = rest["optimizers"], _class_names(optimizers)
    if saved == here and _patterns(rest["groups"]) == _patterns(optimizer.param_groups for optimizer in optimizers):
        return
    if saved == here:
        raise UserError(
            "optimizer state: the checkpoint has other parameter groups; resume with the optimizer and network that "
            "were saved: the same parameter_groups"
        )
    if _key_value(saved) != _key_value(here):
        before = f"optimizer: {_key_value(saved)}"
    elif _has_kernels(saved) != _has_kernels(here):
        before = f"muon_convolutions: {str(_has_kernels(saved)).lower()}"
    else:
        before = "the weights_dtype and the parameter_groups of then"
    raise UserError(
        f"optimizer state: the checkpoint holds {' + '.join(saved)}, this run uses {' + '.join(here)}; resume with "
        f"the optimizer and network that were saved: {before}"
    )


def _has_kernels(class_names: Sequence[str]) -> bool:
    return any(name.endswith("KernelMuon") for name in class_names)


def _key_value(class_names: Sequence[str]) -> str:
    """What the key `optimizer` says where a run has optimizers of these classes."""
    if any(name.endswith("Muon") for name in class_names):
        return "muon"  # with AdamW for the rest
    name = class_names[0].removeprefix("Stochastic") if class_names else ""
    return {"AdamWScheduleFree": "schedulefree"}.get(name, name.lower())


@torch.no_grad()
def _make_state(optimizer: Optimizer, names: set[str]) -> None:
    """A step with zero gradients at learning rate 0 for the named parameters without state; weights don't change."""
    parameters = _parameters(optimizer)
    empty = {parameters[name] for name in names & parameters.keys() if not optimizer.state.get(parameters[name])}
    if not empty:
        return
    before = [(parameter, parameter.grad) for parameter in parameters.values()]
    settings = [dict(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        if "train_mode" in group:
            group["train_mode"] = True
    for parameter, _ in before:
        parameter.grad = torch.zeros_like(parameter) if parameter in empty else None
    optimizer.step()
    for parameter, gradient in before:
        parameter.grad = gradient
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def _parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    }


def _groups(optimizers: Iterable[Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def _progress(group: dict) -> dict:
    return {key: value for key, value in group.items() if key not in _SETTINGS}


def _patterns(groups: Iterable[list[dict]]) -> list[list[str | None]]:
    """What the groups of each optimizer are known by."""
    return [[group.get("pattern") for group in own] for own in groups]


def _class_names(optimizers: list[Optimizer]) -> list[str]:
    return [getattr(optimizer, "class_name", type(optimizer).__name__) for optimizer in optimizers]
