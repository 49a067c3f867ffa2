"""The configuration of a published training of NOVA as ours: a YACS tree (of 2025-02), and a JSON of DeepSpeed.

Their dump of a configuration writes an empty text as nothing, which YAML reads as null, and 1e-05 without a dot, which
its programs read as text: here both are what they were.
"""

import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from families.common.converted import ConvertedConfig, flat
from families.common.library_files import component_folder, construct, read_config
from families.common.weight_files import AUTOENCODER, GENERATOR, TEXT
from families.nova import published_deepspeed
from families.nova.files import PART
from families.nova.published_groups import Kind, published_groups
from families.nova.records import METADATA
from families.nova.versions import PUBLISHED_CLASSES, VERSIONS, of_classes, version_of
from modules.nova import NOVATransformer
from warpcore.errors import UserError
from warpcore.mistakes import keys_meant
from warpcore.safe_json import read_object
from warpcore.text import brief

DEFAULTS: dict[str, Any] = {
    "NUM_GPUS": 1, "RNG_SEED": 3, "GPU_ID": 0,
    "PIPELINE.TYPE": "", "PIPELINE.MODULES": {},
    "MODEL.TYPE": "transformer", "MODEL.CONFIG": {}, "MODEL.WEIGHTS": "", "MODEL.PRECISION": "bfloat16",
    "SOLVER.BASE_LR": 1e-4, "SOLVER.MIN_LR": 0.0, "SOLVER.LR_POLICY": "", "SOLVER.DECAY_STEPS": [],
    "SOLVER.DECAY_GAMMA": 0.5, "SOLVER.WARM_UP_STEPS": 250, "SOLVER.WARM_UP_FACTOR": 0.001,
    "SOLVER.MAX_STEPS": 2147483647, "SOLVER.ACCUM_STEPS": 1, "SOLVER.OPTIMIZER": "AdamW", "SOLVER.ADAM_BETA2": 0.95,
    "SOLVER.WEIGHT_DECAY": 0.02, "SOLVER.DISPLAY": 20, "SOLVER.EMA_EVERY": 100, "SOLVER.SNAPSHOT_EVERY": 5000,
    "SOLVER.SNAPSHOT_PREFIX": "",
    "TRAIN.DATASET": "", "TRAIN.DATASET2": "", "TRAIN.LOADER": "", "TRAIN.BATCH_SIZE": 1, "TRAIN.NUM_THREADS": 4,
    "TRAIN.LOSS_REPEAT": 4, "TRAIN.CHECKPOINTING": 0, "TRAIN.MODEL_EMA": 0.99, "TRAIN.DEVICE_EMA": "",
}  # fmt: skip
"""All keys, each with the value that it has where a configuration lacks it."""
SECTIONS = frozenset(name.partition(".")[0] for name in DEFAULTS if "." in name)
MAPPINGS = frozenset(name for name, value in DEFAULTS.items() if isinstance(value, dict))
NOT_TAKEN = {
    "GPU_ID": "the environment variable CUDA_VISIBLE_DEVICES chooses a GPU",
    "SOLVER.SNAPSHOT_PREFIX": "weights files are called after their network",
    "TRAIN.DATASET2": "a tar has all fields of a sample: put those of both folders into one before",
    "TRAIN.LOADER": "a tar says itself what is in it",
    "TRAIN.NUM_THREADS": "it has no effect there, either; num_workers says here how many processes read",
}
"""Keys without one of ours that could stand for them, and why."""
ONLY_WITH: dict[str, tuple[str, str]] = {
    "SOLVER.MIN_LR": ("SOLVER.LR_POLICY", "cosine_decay"),
    **dict.fromkeys(("SOLVER.DECAY_STEPS", "SOLVER.DECAY_GAMMA"), ("SOLVER.LR_POLICY", "steps_with_decay")),
}
"""Keys that are read with one value of another one alone."""
KINDS: dict[str, tuple[Kind, str | None]] = {
    "nova_train_t2i": ("text to image", "d48w1024-sdxl1024"),
    "nova_train_t2v": ("text to video", "d48w1024-osp480"),
    "nova_train_c2i": ("class to image", None),
}
"""What a pipeline trains, and the network of its guide, which has none of classes."""
MODULES = {"transformer": GENERATOR, "vae": AUTOENCODER, "text_encoder": TEXT}
"""Parts that a configuration takes from other folders than its pipeline's, and the keys that take them."""
MODULES_NOT_TAKEN = {
    "tokenizer": "it is read from the folder beside the text encoder's",
    "scheduler": "diffusion_target and shift stand for it",
}
PRECISIONS = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
OWN_KEYS = ("video_mixer_rank", "rotary_pos_embed")
"""Numbers of a network that are keys here; `model_version` stands for the others."""
OF_SIZE = ("image_size", "image_base_size", "video_base_size")
"""Numbers that follow from `image_size`; the first one of `video_base_size` is that of the network."""
LISTS = {"arch": 3, "image_base_size": 2, "video_base_size": 3}
"""Numbers of a network that are lists, and how long these are."""
TOKEN_PX = 16
"""Pixels per token and side of published networks."""
FRAME_STRIDE = 2
"""Of the clips that the guide caches."""
CAPTIONS = [["txt", "json.text"], "lambda caption, text: [caption, text]"]
"""The long caption half of the time, else the short one."""
CLASSES = ["json", "lambda j: j['label']"]
"""The number of a sample's class."""
NO_CAPTIONS = ["key", "identity"]
"""Of samples whose texts are there as states alone."""


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is one of these trees."""
    return bool(SECTIONS & config.keys())


def convert(config: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> ConvertedConfig:
    """Our keys for a published configuration, and what of it is not taken over.

    deepspeed: that of DeepSpeed; empty where the training runs without.

    Raises:
        ValueError: a key is unknown or has a value that it can't have; the message names it.
    """
    given = {name: value for name, value in flat(config, MAPPINGS).items() if value is not None and value != {}}
    theirs = DEFAULTS | {name: _typed(name, value) for name, value in given.items()}
    made = ConvertedConfig("train_nova")
    made.not_taken |= {name: NOT_TAKEN[name] for name in given if name in NOT_TAKEN and theirs[name] != ""}
    for name, (key, value) in ONLY_WITH.items():
        if name in given and theirs[name] != DEFAULTS[name] and theirs[key] != value:
            made.not_taken[name] = f"it has no effect there, either, with {key}: {theirs[key] or brief('')}"
    _networks(theirs, made)
    _batches(theirs, made)
    _rates(theirs, made)
    made.values |= {
        "seed": theirs["RNG_SEED"],
        "log_every": theirs["SOLVER.DISPLAY"],
        "save_every": theirs["SOLVER.SNAPSHOT_EVERY"],
        "backup_every": theirs["SOLVER.SNAPSHOT_EVERY"],  # no snapshot is deleted there
        "loss_repeat": theirs["TRAIN.LOSS_REPEAT"],
        "activation_checkpointing": theirs["TRAIN.CHECKPOINTING"],
    }
    if theirs["TRAIN.MODEL_EMA"]:
        made.values |= {
            "ema_start_iters": 0,
            "ema_iters": theirs["SOLVER.EMA_EVERY"],
            "ema_beta": theirs["TRAIN.MODEL_EMA"],
            "ema_at_end": True,
            "ema_device": "cpu" if theirs["TRAIN.DEVICE_EMA"] == "cpu" else "same",
        }
    else:
        of_average = [name for name in ("SOLVER.EMA_EVERY", "TRAIN.DEVICE_EMA") if name in given]
        made.not_taken |= dict.fromkeys(of_average, "without TRAIN.MODEL_EMA there is no average")
    if deepspeed:
        sizes = {theirs: made.values[ours] for theirs, ours in published_deepspeed.SIZES.items()}
        more, left = published_deepspeed.convert(deepspeed, theirs["NUM_GPUS"], sizes)
        made.values |= more
        made.not_taken |= left
    return made


def _typed(name: str, value: Any) -> Any:
    """A value of the type that the key has: text that is a number becomes one, as their reader does not do it."""
    if name not in DEFAULTS:
        near = keys_meant(name, DEFAULTS)
        raise ValueError(f"{name}: no key of this program" + (f"; did you mean {near[0]}?" if near else ""))
    kind = type(DEFAULTS[name])
    if kind in (int, float) and isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = float("nan")
        if kind is float and abs(number) < float("inf"):
            return number
        if number.is_integer() and number >= 0:
            return int(number)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    wanted = {int: "a whole number from 0", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
    raise ValueError(f"{name}: found {brief(value)}, where {wanted[kind]} is needed")


def _one_of(theirs: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> Any:
    if theirs[name] not in known:
        raise ValueError(f"{name}: found {brief(theirs[name])}; there is {', '.join(filter(None, known))}")
    return known[theirs[name]]


def _networks(theirs: Mapping[str, Any], made: ConvertedConfig) -> None:
    """What is trained, of which networks, and on what."""
    if theirs["MODEL.TYPE"] != "transformer":
        raise ValueError(f"MODEL.TYPE: found {brief(theirs['MODEL.TYPE'])}; only the transformer is trained here")
    kind, usual = _one_of(theirs, "PIPELINE.TYPE", KINDS)
    places = dict.fromkeys(MODULES, theirs["MODEL.WEIGHTS"]) | theirs["PIPELINE.MODULES"]
    for name, place in places.items():
        if name in MODULES and place:
            made.values[MODULES[name]] = str(place)
        elif place:
            made.not_taken[f"PIPELINE.MODULES.{name}"] = MODULES_NOT_TAKEN.get(name, "no network here has this part")
    saved = _saved_numbers(places["transformer"])
    numbers = saved | theirs["MODEL.CONFIG"]
    _check_lists(numbers)
    version = version_of(numbers) if "arch" in numbers else None
    if "arch" in theirs["MODEL.CONFIG"] and version is None:
        raise ValueError(f"MODEL.CONFIG: no network here has these numbers; there is {', '.join(VERSIONS)}")
    published = (name for name, one in VERSIONS.items() if one.is_published)
    version = version or next((name for name in published if name in str(places["transformer"])), usual)
    if version is None:
        raise ValueError(f"PIPELINE.TYPE: {theirs['PIPELINE.TYPE']} has no usual network: say in MODEL.CONFIG which "
                         "arch it has, or name weights that are here")  # fmt: skip
    of_version = VERSIONS[version]
    network = dict(of_version.network)
    if kind == "class to image":
        network = of_classes(network, numbers.get("num_classes", PUBLISHED_CLASSES))
        made.values |= {"num_classes": network["num_classes"], "class_getter": CLASSES}
        made.values.pop(TEXT, None)
        if theirs["PIPELINE.MODULES"].get("text_encoder"):
            made.not_taken["PIPELINE.MODULES.text_encoder"] = "a network of classes reads no texts"
    if kind == "text to video" and not of_version.draws_clips:
        raise ValueError(f"PIPELINE.TYPE: {theirs['PIPELINE.TYPE']} trains on clips, but weights or MODEL.CONFIG are "
                         f"those of {version}, which draws pictures: name weights of a network of clips")  # fmt: skip
    own = {key: numbers[key] for key in OWN_KEYS if numbers.get(key)}
    _check_numbers(theirs["MODEL.CONFIG"], version, {**network, **saved})
    height, width = (
        TOKEN_PX * tokens for tokens in numbers.get("image_base_size", of_version.network["image_base_size"])
    )
    made.values |= {"model_version": version, **own, "image_size": height if height == width else [width, height]}
    made.values |= {"num_frames": of_version.frames if kind == "text to video" else 1, "crop_mode": "center"}
    if kind == "text to video":
        made.values |= {"frame_stride": FRAME_STRIDE, "motion_column": "flow"}
    with torch.device("meta"):
        built = construct(NOVATransformer, {**network, **own}, "MODEL.CONFIG")
    names = [f"generator.{name}" for name, _ in built.named_parameters()]
    groups = published_groups(kind, names, theirs["SOLVER.WEIGHT_DECAY"])
    made.values["parameter_groups"] = [group.model_dump(exclude_defaults=True) for group in groups]
    made.values["dtype"] = _one_of(theirs, "MODEL.PRECISION", PRECISIONS)
    if records := theirs["TRAIN.DATASET"]:
        tars = f"{records.rstrip('/')}_tars"
        made.values["webdataset_path"] = tars
        if kind != "class to image":
            made.values["captions_getter"] = NO_CAPTIONS if _has_states(Path(records)) else CAPTIONS
        folders = shlex.join([records, tars])
        made.before.append(
            f"python3 tools/build_dataset.py {folders} --records --for train/{made.script}.py {{config}}"
        )


def _check_lists(numbers: Mapping[str, Any]) -> None:
    for name, length in LISTS.items():
        value = numbers.get(name, [0] * length)
        sizes = name == "arch" or (isinstance(value, list) and all(isinstance(one, int) for one in value))
        if not isinstance(value, list) or len(value) != length or not sizes:
            raise ValueError(f"MODEL.CONFIG.{name}: found {brief(value)}, where a list of {length} is needed")


def _check_numbers(given: Mapping[str, Any], version: str, network: Mapping[str, Any]) -> None:
    """Raise ValueError where a network is to have other numbers than it has here."""
    for name, value in given.items():
        here = network.get(name)
        if name in OWN_KEYS or (name in OF_SIZE and (name != "video_base_size" or value[0] == here[0])):
            continue
        if (list(here) if isinstance(here, tuple) else here) != value:
            raise ValueError(
                f"MODEL.CONFIG.{name}: found {brief(value)}, but model_version {version} has {brief(here)}"
            )


def _has_states(records: Path) -> bool:
    """Whether a folder of records, if it is here, holds states of a text encoder in place of captions."""
    path = records / METADATA
    try:
        features = read_object(path, str(path)).get("features") if path.is_file() else None
    except UserError as error:
        raise ValueError(str(error)) from None
    return isinstance(features, dict) and isinstance(features.get("caption"), dict)


def _saved_numbers(place: str) -> dict[str, Any]:
    """What is known of the constructor numbers of the network in a folder, where that is here."""
    folder = component_folder(Path(place), PART) if place else None
    try:
        saved = read_config(folder, "MODEL.WEIGHTS") if folder is not None and folder.is_dir() else None
    except UserError as error:
        raise ValueError(str(error)) from None
    return saved or {}


def _batches(theirs: Mapping[str, Any], made: ConvertedConfig) -> None:
    processes, size, parts = (theirs[name] for name in ("NUM_GPUS", "TRAIN.BATCH_SIZE", "SOLVER.ACCUM_STEPS"))
    for name in ("NUM_GPUS", "TRAIN.BATCH_SIZE", "SOLVER.ACCUM_STEPS"):
        if not theirs[name]:
            raise ValueError(f"{name}: found 0, where a number above 0 is needed")
    made.values |= {
        "batch_size": processes * size * parts,
        "micro_batch_size": size,
        "grad_accum_steps": parts,
        "processes": processes,
    }


def _rates(theirs: Mapping[str, Any], made: ConvertedConfig) -> None:
    """Optimizer and learning rates."""
    _one_of(theirs, "SOLVER.OPTIMIZER", {"AdamW": "adamw"})
    lr, warm_up, factor = (theirs[f"SOLVER.{name}"] for name in ("BASE_LR", "WARM_UP_STEPS", "WARM_UP_FACTOR"))
    made.values |= {
        "optimizer": "adamw",
        "betas": [0.9, theirs["SOLVER.ADAM_BETA2"]],
        "eps": 1e-8,
        "weight_decay": theirs["SOLVER.WEIGHT_DECAY"],
        "clip_grad_norm": None,
        "lr": lr,
        "updates": theirs["SOLVER.MAX_STEPS"],
    }
    if not lr > 0:
        raise ValueError(f"SOLVER.BASE_LR: found {lr:g}, where a number above 0 is needed")
    policy = _one_of(
        theirs, "SOLVER.LR_POLICY", {"": "constant", "cosine_decay": "cosine", "steps_with_decay": "steps"}
    )
    if policy == "steps":
        made.values |= _steps(theirs, warm_up, factor)
        return
    made.values |= {"lr_schedule": policy, "warmup_updates": max(warm_up, 1)}
    if policy == "cosine":
        made.values["min_lr_ratio"] = theirs["SOLVER.MIN_LR"] / lr
    if warm_up and factor:
        made.not_taken["SOLVER.WARM_UP_FACTOR"] = (
            f"a warm-up begins here at lr / {warm_up}, which differs by less than {factor:g} of lr"
        )


def _steps(theirs: Mapping[str, Any], warm_up: int, factor: float) -> dict[str, Any]:
    """A rate that falls at some updates, as cycles in each of which it is constant."""
    falls = theirs["SOLVER.DECAY_STEPS"]
    if not all(isinstance(one, int) and one > 1 for one in falls) or falls != sorted(set(falls)):
        raise ValueError(f"SOLVER.DECAY_STEPS: found {brief(falls)}, where numbers from 2 that grow are needed")
    factors = [theirs["SOLVER.DECAY_GAMMA"] ** i for i in range(len(falls) + 1)]
    begins = [0, *(fall - 1 for fall in falls)]  # the last number of a cycle belongs to it
    lengths = [end - begin for begin, end in pairwise(begins)]
    begin = factor + (1 - factor) / warm_up if warm_up else 1.0
    return {
        "lr_schedule": "lambdalinear",
        "cycle_lengths": [*lengths, max(theirs["SOLVER.MAX_STEPS"], 1)],
        "warm_up_steps": [max(warm_up - 1, 0), *[0] * len(falls)],
        "f_start": [begin, *factors[1:]],
        "f_max": factors,
        "f_min": factors,
    }
