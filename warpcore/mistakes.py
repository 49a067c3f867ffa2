"""What is wrong with a configuration, as a user wrote it."""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from warpcore.errors import ConfigError
from warpcore.keys import parts_of, type_name
from warpcore.redaction import CREDENTIALS_ELSEWHERE, has_credentials
from warpcore.safe_yaml import MAX_LEVELS
from warpcore.text import brief, is_whole, shortened

MAX_REPORTED = 20
"""Mistakes that a message names."""
MAX_INTEGER = 2**63 - 1
CLIP_KEYS = ("num_frames", "frame_stride", "frame_rate", "bucket_config", "micro_batches_per_update")
"""Those of `warpcore.clip_keys`, which others may meet in a script that does not take them."""

OTHER_NAMES = {
    "algo": "adapter", "cfg": "guidance", "cfg_scale": "guidance", "checkpoint": "generator_checkpoint_path",
    "dataset": "webdataset_path", "epochs": "updates", "gradient_accumulation_steps": "grad_accum_steps",
    "guidance_scale": "guidance", "learning_rate": "lr", "loras": "lora", "lr_scheduler": "lr_schedule",
    "lr_warmup_steps": "warmup_updates", "max_grad_norm": "clip_grad_norm", "max_steps": "updates",
    "max_train_epochs": "updates", "max_train_steps": "updates", "mixed_precision": "dtype",
    "model": "generator_checkpoint_path", "network_alpha": "alpha", "network_dim": "rank",
    "num_inference_steps": "steps", "optimizer_type": "optimizer", "output": "output_path",
    "output_dir": "checkpoint_path", "output_name": "experiment_id", "precision": "dtype",
    "pretrained_model_name_or_path": "generator_checkpoint_path", "prompt": "prompts", "resolution": "image_size",
    "save_every_n_epochs": "save_every", "save_every_n_steps": "save_every", "save_steps": "save_every",
    "train_batch_size": "batch_size", "train_data_dir": "webdataset_path", "vae": "autoencoder_checkpoint_path",
    "warmup_steps": "warmup_updates",
}  # fmt: skip
"""What other trainers and programs call a key, and what it is called here."""


def keys_meant(key: str, there: Collection[str], count: int = 1) -> list[str]:
    """Which of the keys that there are an unknown one may stand for: that by another name, or the nearest names."""
    meant = OTHER_NAMES.get(key.lower().replace("-", "_"))
    return [meant] if meant in there else difflib.get_close_matches(key, there, n=count)


def check_values(values: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Refuse what no key can be: it would fail where it is used, far from here.

    Raises:
        ConfigError: names the key, and in which of the `files` it stands.
    """
    for key, value in values.items():
        if problem := _problem_of(value):
            where = f" in {files[key]}" if key in files else ""
            raise ConfigError(f"{shortened(str(key))}: found {brief(value)}{where}, but {problem}")


def _problem_of(value: Any, levels: int = MAX_LEVELS) -> str:
    if isinstance(value, dict | list | tuple):
        if not levels:
            return f"lists and mappings can be nested {MAX_LEVELS} levels deep"
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next(filter(None, (_problem_of(one, levels - 1) for one in parts)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number is needed"
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        return f"integers go from {-MAX_INTEGER} to {MAX_INTEGER}"
    if isinstance(value, str) and not is_whole(value):
        return "text can't hold the character zero, or half a character (a surrogate, or bytes that are not UTF-8)"
    if isinstance(value, str) and has_credentials(value):
        return f"a URL is written without credentials, as they would be saved with the config. {CREDENTIALS_ELSEWHERE}"
    return ""


def explain_all(kind: type[BaseModel], mistakes: Sequence[Any], files: Mapping[str, Path]) -> str:
    """A line for each of pydantic's errors, but no more than MAX_REPORTED."""
    first = mistakes[:MAX_REPORTED]
    simpler = {mistake["loc"][:1] for mistake in first if mistake["type"] != "tuple_type"}  # one number, or two
    told = [mistake for mistake in first if mistake["type"] != "tuple_type" or mistake["loc"][:1] not in simpler]
    lines = list(dict.fromkeys(explain(kind, mistake, files) for mistake in told))
    if len(mistakes) > MAX_REPORTED:
        lines.append(f"and {len(mistakes) - MAX_REPORTED} more mistakes")
    return "\n  ".join(["the configuration is wrong:", *lines])


def explain(kind: type[BaseModel], mistake: Any, files: Mapping[str, Path]) -> str:
    """A line about one of pydantic's errors: the key, what was found, in which of the `files`, and what to write."""
    location = [shortened(str(part)) for part in mistake["loc"]]
    key = location[0] if location else ""
    where = f" in {files[key]}" if key in files else ""
    match mistake["type"]:
        case "extra_forbidden" if len(location) > 1:
            return f"{'.'.join(location)}: unknown key{where}"
        case "missing" if len(location) > 1 and isinstance(mistake["loc"][-1], str):
            return f"{'.'.join(location)}: this key is required{where}"
        case "extra_forbidden" if key in CLIP_KEYS:
            return f"{key}: unknown key{where}: it is for scripts that train on clips, and this one takes pictures"
        case "extra_forbidden":
            near = keys_meant(key, kind.model_fields)
            return f"{key}: unknown key{where}" + (f"; did you mean {near[0]}?" if near else "; --help lists all keys")
        case "missing" if len(location) == 1:
            return f"{key}: this key is required. {kind.model_fields[key].description or ''}"
        case "value_error":
            reason = shortened(str(mistake["ctx"]["error"]), 2000)
        case "tuple_type":
            reason = "a list in brackets is needed"
        case "model_type":
            reason = "a mapping with keys of its own is needed"
        case _:
            reason = mistake["msg"] + ("; put it in quotes" if mistake["type"] == "string_type" else "")
    if not key:
        return reason
    name, field = key, kind.model_fields.get(key)
    for part in parts_of(field.annotation) if field and len(location) > 1 else ():
        if isinstance(part, type) and issubclass(part, BaseModel) and location[1] in part.model_fields:
            name, field = f"{key}.{location[1]}", part.model_fields[location[1]]
    default = kind.model_fields[key].default if key in kind.model_fields else None
    if mistake["input"] is None and len(location) == 1 and default in ([], {}):
        return f"{key}: found null{where}; write {default} for none"
    wanted = type_name(field.annotation) if field else ""
    return f"{name}: found {brief(mistake['input'])}{where}, but {reason[0].lower() + reason[1:]} (expected: {wanted})"
