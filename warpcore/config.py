"""Configuration: a YAML file and arguments (`key=value` or `--key value`) become one typed, frozen object.

Nothing in it is executed.

A use case subclasses `Config`, adds its keys, and calls `load_config(MyConfig)`. The keys that all have are in
`warpcore.config_keys`.
"""

import logging
import os
import shlex
import sys
import types
from collections.abc import Callable, Mapping
from numbers import Rational
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TypeVar

import yaml
from pydantic import ValidationError, model_validator

from warpcore.arguments import pairs, read_arguments
from warpcore.average_keys import AverageKeys
from warpcore.config_files import BASE, read_config
from warpcore.config_keys import (
    DataKeys,
    FileName,
    OptimisationKeys,
    ReportKeys,
    RunKeys,
    Settings,
    Share,
    ShareBelowOne,
)
from warpcore.data.buckets import Buckets
from warpcore.data.storage import local_path
from warpcore.epochs import IN_UPDATES, in_updates
from warpcore.errors import ConfigError, UserError
from warpcore.idle_keys import about_idle
from warpcore.keys import help_text, local_paths, parts_of
from warpcore.lr_schedules import CYCLE_KEYS, CYCLES, CYCLIC, LinearCycles
from warpcore.mistakes import check_values, explain_all
from warpcore.text import printable
from warpcore.unused_keys import check_unused

__all__ = [
    "Config",
    "ConfigError",
    "FileName",
    "Settings",
    "Share",
    "ShareBelowOne",
    "dump_config",
    "load_config",
    "make_config",
]


class Config(ReportKeys, DataKeys, AverageKeys, OptimisationKeys, RunKeys):  # the last one's keys come first
    """The keys that every training script understands, whatever it trains."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.validation_path is not None and self.validation_samples:
            raise ValueError("validation_path and validation_samples exclude each other: remove one")
        if isinstance(self.checkpoint_path, Path) and str(self.checkpoint_path).startswith("s3:"):
            raise ValueError(f"checkpoint_path: {self.checkpoint_path} is not of the form s3://bucket/prefix")
        if self.weights_dtype == "bfloat16" and self.dtype in ("float32", "float16"):
            raise ValueError("weights_dtype: bfloat16 needs dtype: bfloat16: remove other values")
        if self.optimizer == "prodigy" and self.lr < 0.1:
            raise ValueError(
                f"lr: {self.lr} is too small for optimizer: prodigy, which finds the learning rate itself and takes "
                "`lr` as a factor on it: write lr: 1"
            )
        if not self.use_fsdp and (self.fsdp_shards or self.fsdp_cpu_offload):
            raise ValueError("fsdp_shards and fsdp_cpu_offload need use_fsdp: true")
        if "activations" in self.offload and not self.activation_checkpointing:
            raise ValueError(
                "offload: activations are what activation_checkpointing keeps: set that to 1, 2 or 3 (all blocks)"
            )
        if self.gradient_topk_pattern and self.gradient_topk is None:
            raise ValueError("gradient_topk_pattern: only gradient_topk reads this: write that, or remove it")
        if self.grad_mean_per_block and not self.grad_mean_groups:
            raise ValueError("grad_mean_per_block: only grad_mean_groups reads this: write that, or remove it")
        self._check_export()
        self._check_cycles()
        self._check_average()
        self._check_fused()
        return self

    @property
    def own_micro_batches(self) -> int | None:
        """Micro-batches of an update where buckets have micro-batch sizes of their own; else `batch_size` counts."""
        return None

    @property
    def processes_per_sample(self) -> int:
        """How many neighbouring processes compute each sample together (sequence parallelism)."""
        return 1

    def for_any_processes(self) -> Self:
        """Without what has to divide the number of processes, for tools that take the config of a training."""
        of_several = {"fsdp_shards": None, "sequence_shards": 1}
        return self.model_copy(update={key: of_several[key] for key in of_several if key in type(self).model_fields})

    @property
    def precision(self) -> str | None:
        """The precision to compute in; None for the usual one of the device."""
        return self.dtype or ("bfloat16" if self.weights_dtype == "bfloat16" else None)

    def buckets(self, factor: int) -> Buckets:
        """The sizes of a run's pictures, sides being multiples of `factor` px.

        Raises:
            UserError: `image_size` and `multi_aspect_ratio` have none.
        """
        return Buckets.for_image_size(
            self.image_size, self.multi_aspect_ratio or (), factor, self.bucketeer_random_ratio
        )

    def in_updates(
        self, rows_per_epoch: Callable[[], float], samples_per_update: Callable[[], Rational] | None = None
    ) -> tuple[Self, list[str]]:
        """The config with updates in place of epochs, and a line about each key that had them.

        rows_per_epoch: finds how many rows an epoch draws; called only where a key has epochs.
        samples_per_update: finds how many of them an update takes, on average; by default `batch_size`.

        Raises:
            UserError: the numbers of updates contradict other keys.
        """
        given = {key: value for key in IN_UPDATES if isinstance(value := getattr(self, key), str)}
        if not given:
            return self, []
        found, lines = in_updates(
            given, rows_per_epoch(), self.batch_size if samples_per_update is None else samples_per_update()
        )
        counted = self.model_copy(update=found)
        try:
            counted._check_export()
            counted._check_cycles()
        except ValueError as error:
            raise UserError(str(error)) from None
        return counted, lines

    def _check_export(self) -> None:
        every, saved = self.export_every, self.save_every
        if isinstance(every, int) and isinstance(saved, int) and every % saved:
            raise ValueError(
                f"export_every: {every} is no multiple of save_every {saved}, and only with checkpoints are weights "
                "exported: write one"
            )

    def _given(self, *keys: str) -> list[str]:
        """Which of the keys have another value than their default."""
        fields = type(self).model_fields
        return [key for key in keys if getattr(self, key) != fields[key].get_default(call_default_factory=True)]

    def _check_cycles(self) -> None:
        if self.lr_schedule not in CYCLIC and self.num_cycles > 1:
            raise ValueError(
                f"num_cycles: only lr_schedule: {', '.join(CYCLIC)} read this: write one of them, or remove it"
            )
        readers = {"lr_power": "polynomial", "decay_updates": "warmup_stable_decay"}
        for key in self._given(*readers):
            if self.lr_schedule != readers[key]:
                raise ValueError(f"{key}: only lr_schedule: {readers[key]} reads this: write that, or remove it")
        if self.lr_schedule == "inverse_sqrt" and self._given("min_lr_ratio"):
            raise ValueError("min_lr_ratio: lr_schedule: inverse_sqrt ends nowhere: remove it")
        parts, whole = (self.warmup_updates, self.decay_updates), self.updates
        if all(isinstance(part, int) for part in (*parts, whole)) and sum(parts) > whole:
            raise ValueError(
                f"decay_updates: {parts[1]} of them and warmup_updates: {parts[0]} are more than updates: {whole}: "
                "write fewer"
            )
        if self.lr_schedule != CYCLES:
            if given := self._given(*CYCLE_KEYS):
                raise ValueError(
                    f"{', '.join(given)}: only lr_schedule: {CYCLES} reads this: write that, or remove it"
                )
            return
        if isinstance(self.updates, int) and self.updates > self.lr_cycles.updates:
            raise ValueError(
                f"updates: {self.updates} are more than the {self.lr_cycles.updates} of all cycle_lengths, after "
                f"which lr_schedule: {CYCLES} has no learning rate: write fewer, or lengthen a cycle"
            )
        if given := self._given("warmup_updates", "min_lr_ratio"):
            raise ValueError(
                f"{', '.join(given)}: the cycles of lr_schedule: {CYCLES} have warm_up_steps and f_min instead: write "
                "those"
            )

    def _check_average(self) -> None:
        if self.ema_profile == "power" and self.ema_start_iters is None:
            raise ValueError("ema_profile: power needs ema_start_iters: write 0 to average from the first update on")
        keys = ("ema_rate", "ema_iteration_shift") if self.ema_profile == "constant" else ("ema_beta", "ema_at_end")
        if given := self._given(*keys):
            other = "power" if self.ema_profile == "constant" else "constant"
            raise ValueError(f"{', '.join(given)}: only ema_profile: {other} reads this: write that, or remove it")

    def _check_fused(self) -> None:
        if self.clip_tensor_norm is not None and self.clip_grad_norm is not None:
            raise ValueError(
                "clip_tensor_norm takes the place of clip_grad_norm: write clip_grad_norm: null beside it"
            )
        if not self.fused_backward:
            return
        if self.clip_grad_norm is not None:
            raise ValueError(
                f"clip_grad_norm: {self.clip_grad_norm:g}: fused_backward has made all steps when the norm of all "
                "gradients is known: write clip_grad_norm: null, and clip_tensor_norm: 1.0 to clip tensor by tensor"
            )
        if self.gradient_topk is not None:
            raise ValueError("gradient_topk needs all gradients at once, and fused_backward frees them: remove one")
        if self.optimizer == "prodigy":
            raise ValueError(
                "optimizer: prodigy finds its learning rate out of all gradients at once, and fused_backward frees "
                "them: write another optimizer, such as came, or remove fused_backward"
            )
        if self.dtype == "float16":
            raise ValueError(
                "dtype: float16 skips updates whose gradients overflow, and fused_backward has made most steps when "
                "they do: write dtype: bfloat16 or float32, or remove fused_backward"
            )
        if self.compile == "graphs":
            raise ValueError(
                "compile: graphs keeps gradients in the graphs' own memory, of which fused_backward frees none: write "
                "compile: blocks"
            )
        if self.fsdp_cpu_offload or self.processes_per_sample > 1:
            key = "fsdp_cpu_offload" if self.fsdp_cpu_offload else "sequence_shards"
            raise ValueError(
                f"{key} gathers gradients after the backward pass, and fused_backward frees them: remove one"
            )
        self._check_one_micro_batch()

    def _check_one_micro_batch(self) -> None:
        why = "fused_backward: of several micro-batches, gradients would have to be kept until the last: write "
        if self.own_micro_batches not in (None, 1):
            raise ValueError(f"{why}micro_batches_per_update: 1")
        if self.own_micro_batches is None and self.micro_batch_size not in (None, self.batch_size):
            raise ValueError(f"{why}batch_size: {self.micro_batch_size}, or remove micro_batch_size")
        if self.grad_accum_steps not in (None, 1):
            raise ValueError(f"{why}grad_accum_steps: 1, or remove it")

    @property
    def lr_cycles(self) -> LinearCycles | None:
        """Those of `lambdalinear`; None for other schedules."""
        if self.lr_schedule != CYCLES:
            return None
        return LinearCycles(*(tuple(getattr(self, key)) for key in CYCLE_KEYS))

    @property
    def run_folder(self) -> Path:
        """Where the run writes; with `run_url`, what it is sent from."""
        if isinstance(self.checkpoint_path, Path):
            return self.checkpoint_path / self.experiment_id
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "warpcore")
        scratch = self.scratch_path or cache / "runs"
        return scratch / self.checkpoint_path.removeprefix("s3://").rstrip("/") / self.experiment_id

    @property
    def run_url(self) -> str | None:
        """Of the run on S3."""
        if isinstance(self.checkpoint_path, Path):
            return None
        return f"{self.checkpoint_path.rstrip('/')}/{self.experiment_id}"

    @property
    def run_place(self) -> str:
        """Where people look for the run."""
        return self.run_url or str(self.run_folder)

    def is_saved(self, update: int) -> bool:
        """Whether a checkpoint is written after this update."""
        return self.is_evaluated(update) or self.is_backup(update) or self.is_snapshot(update)

    def is_evaluated(self, update: int) -> bool:
        """Whether the validation and sample pictures come with that checkpoint."""
        return update == self.updates or update % self.save_every == 0

    def is_exported(self, update: int) -> bool:
        """Whether weights files come with a checkpoint of this update, if there is one."""
        every = self.export_every
        return every is None or update == self.updates or update % every == 0 or self.is_backup(update)

    def is_backup(self, update: int) -> bool:
        """Whether its weights are kept for good."""
        return self.backup_every is not None and update % self.backup_every == 0

    def is_snapshot(self, update: int) -> bool:
        """Whether averages are kept for good, of which others are made."""
        averages = self.post_hoc_ema
        return averages is not None and (update == self.updates or update % averages.every == 0)

    @property
    def samples_folder(self) -> Path:
        return self.output_path / self.experiment_id if self.output_path else self.run_folder / "samples"

    @property
    def where_shown(self) -> str:
        """How to look at the run, as an indented line."""
        return f"  to look at it as it goes: python3 tools/runs.py {shlex.quote(printable(str(self.checkpoint_path)))}"


logger = logging.getLogger(__name__)

AnySettings = TypeVar("AnySettings", bound=Settings)


def load_config(kind: type[AnySettings], arguments: list[str] | None = None) -> AnySettings:
    """Read `config.yaml [key=value ...]` from the command line (or `arguments`); `--help` lists every key and exits.

    The file may start from others, see `warpcore.config_files`; what the command line says wins over all files.
    `--key value` is understood too. A key that takes text takes it as it is, other values are YAML. A key that takes a
    list may be given one value, or be repeated: `--seeds 1 --seeds 2`.

    Raises:
        ConfigError: for a missing file, an unknown key, a wrong type or an impossible combination.
        UserError: the file is a URL.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"usage: {sys.argv[0]} config.yaml [key=value | --key value ...]\n{help_text(kind)}")
        raise SystemExit(0)
    arguments, values, files = list(arguments), {}, {}
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("--"):
        values, files = read_config(local_path(arguments.pop(0)))
    read_arguments(kind, arguments, values)
    if BASE in values:
        raise ConfigError(f"{BASE}: only a config file may start from others: write this line into one")
    for key, _ in pairs(arguments):
        files.pop(key.partition(".")[0], None)
    values = {key: value for key, value in values.items() if not _is_unset(kind, key, value)}
    config = make_config(kind, values, files)
    if isinstance(config, Config):
        _name_a_run_of_the_same_number(config)
    return config


def _is_unset(kind: type[Settings], key: str, value: Any) -> bool:
    """Whether `null` was written for a number or word that is never null: it takes that of a base file away."""
    field = kind.model_fields.get(key)
    if value is not None or field is None or field.is_required() or field.default in ([], {}):
        return False
    return types.NoneType not in parts_of(field.annotation)


def _name_a_run_of_the_same_number(config: Config) -> None:
    """Log a run `7` where `007` would begin another, as the two used to be the same."""
    name = config.experiment_id
    number = name.lstrip("0") or "0"
    there = config.run_folder.with_name(number)
    if name.isdecimal() and number != name and there.is_dir() and not config.run_folder.is_dir():
        logger.warning("%s is a run of its own, not %s: to go on with that one, write experiment_id=%s",
                       name, there, number)  # fmt: skip


def make_config(
    kind: type[AnySettings], values: dict[str, Any], files: Mapping[str, Path] = MappingProxyType({})
) -> AnySettings:
    """Check `values` against the keys of `kind`.

    files: the config file in which a key stands, for the messages.

    Raises:
        ConfigError: one line for each mistake.
    """
    check_values(values, files)
    try:
        values = local_paths(kind, values)  # before all else, as other checks look for files
    except UserError as error:
        raise ConfigError(str(error)) from None
    try:
        config = kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain_all(kind, error.errors(include_url=False), files)) from None
    check_unused(config, kind.unused & values.keys(), files)
    for line in about_idle(config, values):
        logger.warning(line)
    return config


def dump_config(config: Settings) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
