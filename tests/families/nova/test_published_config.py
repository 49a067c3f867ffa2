"""Configurations of published trainings become ours: every key is mapped, or named with the reason."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from families.nova.config import NovaConfig
from families.nova.published_config import DEFAULTS, convert
from families.nova.versions import VERSIONS
from tests.golden import load_case
from tools import convert_config
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.idle_keys import about_idle
from warpcore.lr_schedules import lr_at

CALLS = {call["name"]: call for call in load_case("nova/config_yacs")[0]["calls"]}
GUIDE = {
    "NUM_GPUS": 8,
    "PIPELINE": {"TYPE": "nova_train_t2v"},
    "MODEL": {"TYPE": "transformer", "WEIGHTS": "/weights/nova-d48w1024-osp480", "PRECISION": "bfloat16"},
    "SOLVER": {"BASE_LR": 1e-4, "MAX_STEPS": 100, "WARM_UP_STEPS": 10, "ACCUM_STEPS": 2, "SNAPSHOT_PREFIX": "x"},
    "TRAIN": {
        "DATASET": "./datasets/clips", "BATCH_SIZE": 3, "CHECKPOINTING": 2, "MODEL_EMA": 0.97, "DEVICE_EMA": "cpu",
        "NUM_THREADS": 8, "LOADER": "vae_train",
    },
}  # fmt: skip
"""As the guide has it."""


def written(tmp_path: Path, theirs: Any, *keys: str, deepspeed: dict | None = None) -> tuple[NovaConfig, str]:
    """Our config for theirs, a mapping or a text, and the file."""
    given = tmp_path / "theirs.yaml"
    given.write_text(theirs if isinstance(theirs, str) else yaml.safe_dump(theirs), encoding="utf-8")
    launcher = None
    if deepspeed is not None:
        launcher = tmp_path / "zero.json"
        launcher.write_text(json.dumps(deepspeed), encoding="utf-8")
    ours = tmp_path / "ours.yaml"
    convert_config.convert(given, ours, launcher, list(keys), overwrite=True)
    return load_config(NovaConfig, [str(ours)]), ours.read_text(encoding="utf-8")


def test_the_defaults_are_those_of_the_reference():
    def flat(values: dict, before: str = "") -> dict[str, Any]:
        found = {}
        for name, value in values.items():
            found |= flat(value, f"{before}{name}.") if isinstance(value, dict) and value else {before + name: value}
        return found

    assert flat(CALLS["defaults"]["result"]) == DEFAULTS


def test_a_configuration_of_the_guide_becomes_ours(tmp_path):
    config, text = written(tmp_path, GUIDE)
    expected = {
        "processes": 8, "batch_size": 48, "micro_batch_size": 3, "grad_accum_steps": 2, "seed": 3, "updates": 100,
        "model_version": "d48w1024-osp480", "image_size": (768, 480), "num_frames": 33, "frame_stride": 2,
        "motion_column": "flow", "dtype": "bfloat16", "lr": 1e-4, "lr_schedule": "constant", "warmup_updates": 10,
        "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.02, "clip_grad_norm": None, "optimizer": "adamw",
        "ema_start_iters": 0, "ema_beta": 0.97, "ema_iters": 100, "ema_device": "cpu", "ema_at_end": True,
        "loss_repeat": 4, "activation_checkpointing": 2, "log_every": 20, "save_every": 5000, "backup_every": 5000,
        "generator_checkpoint_path": Path("/weights/nova-d48w1024-osp480"), "crop_mode": "center",
        "autoencoder_checkpoint_path": Path("/weights/nova-d48w1024-osp480"), "experiment_id": "ours",
        "webdataset_path": "./datasets/clips_tars", "use_fsdp": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    frozen = [group.pattern for group in config.parameter_groups if group.frozen]
    assert frozen == ["text_embed.norm.*", "motion_embed.*"]
    for line in (
        "python3 tools/build_dataset.py ./datasets/clips ./datasets/clips_tars --records --for train/train_nova.py",
        "SOLVER.SNAPSHOT_PREFIX: weights files are called after their network",
        "TRAIN.NUM_THREADS: it has no effect there, either", "TRAIN.LOADER: a tar says itself",
    ):  # fmt: skip
        assert line in text


def test_a_training_on_classes_becomes_ours(tmp_path):
    """Of 256 px: the numbers that its pipeline lacks in the guide are said by MODEL.CONFIG."""
    network = {
        "arch": ["vit_d16w768", "vit_d32w768", "mlp_d6w768"], "image_size": 256, "image_base_size": [16, 16],
        "video_base_size": [1, 8, 8], "text_token_dim": None,
    }  # fmt: skip
    theirs = GUIDE | {"PIPELINE": {"TYPE": "nova_train_c2i", "MODULES": {"text_encoder": "phi"}}}
    theirs["MODEL"] = {"WEIGHTS": "weights", "CONFIG": network}
    config, text = written(tmp_path, theirs)
    expected = {
        "num_classes": 1000, "class_getter": ("json", "lambda j: j['label']"), "num_frames": 1, "image_size": 256,
        "model_version": "d48w768-sdxl1024", "text_encoder_checkpoint_path": None, "motion_column": None,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    frozen = [group.pattern for group in config.parameter_groups if group.frozen]
    assert frozen == ["label_embed.norm.*", "video_pos_embed.*", "video_encoder.patch_embed.*"]
    assert "PIPELINE.MODULES.text_encoder: a network of classes reads no texts" in text
    theirs["MODEL"] = {"CONFIG": network | {"num_classes": 10}}
    assert written(tmp_path, theirs)[0].num_classes == 10
    assert about_idle(config, config.model_fields_set) == []


def test_commands_take_folders_with_spaces(tmp_path):
    home = tmp_path / "my configs"
    home.mkdir()
    _, text = written(home, {"PIPELINE": {"TYPE": "nova_train_t2i"}, "TRAIN": {"DATASET": "my records"}})
    assert "tools/build_dataset.py 'my records' 'my records_tars' --records --for train/train_nova.py '" in text
    assert f"python3 train/train_nova.py '{home / 'ours.yaml'}'" in text


def test_a_folder_is_no_mini_because_of_its_name(tmp_path):
    config, _ = written(tmp_path, GUIDE | {"MODEL": {"WEIGHTS": "/home/gemini/weights"}})
    assert config.model_version == "d48w1024-osp480"


def test_keys_behind_the_files_are_ours_and_win(tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(GUIDE), encoding="utf-8")
    ours = tmp_path / "new" / "ours.yaml"
    given = [str(tmp_path / "theirs.yaml"), str(ours), "webdataset_path=data", "--lr", "3e-5"]
    monkeypatch.setattr(sys, "argv", ["convert_config", *given])
    convert_config.main()
    config = load_config(NovaConfig, [str(ours)])
    assert (config.webdataset_path, config.lr) == ("data", 3e-5)
    assert f"written: {ours}" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already: name another file, or give --overwrite"):
        convert_config.main()


def test_what_their_dump_breaks_is_read_as_what_it_was(tmp_path):
    dumped = CALLS["str_of_defaults"]["result"]
    theirs = dumped.replace("TYPE: \n", "TYPE: nova_train_t2i\n", 1).replace("BASE_LR: 0.0001", "BASE_LR: 1e-05")
    theirs = theirs.replace("DATASET: \n", "DATASET: records\n", 1)
    config, _ = written(tmp_path, theirs)
    assert (config.lr, config.ema_device, config.lr_schedule) == (1e-5, "same", "constant")
    assert (config.model_version, config.num_frames, config.image_size) == ("d48w1024-sdxl1024", 1, 1024)
    assert "video_pos_embed.*" in [group.pattern for group in config.parameter_groups if group.frozen]


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("file_")])
def test_files_of_the_reference_are_read_as_what_they_mean_or_refused(name, tmp_path):
    text, result = CALLS[name]["kwargs"]["text"], CALLS[name]["result"]
    theirs = {"PIPELINE": {"TYPE": "nova_train_t2i"}, "TRAIN": {"DATASET": "x"}}
    for section, values in yaml.safe_load(text).items():
        theirs[section] = theirs.get(section, {}) | values if isinstance(values, dict) else values
    key = next(iter(result.get("changed", {"SOLVER.LR": None})))
    if name in ("file_6", "file_7"):
        with pytest.raises(UserError, match=rf"theirs\.yaml: {key}: (no key of this program|found 'many', where)"):
            written(tmp_path, theirs)
        return
    config, _ = written(tmp_path, theirs)
    assert {
        "file_0": config.lr == 1.0, "file_1": config.lr == 1e-5, "file_2": config.lr == 1e-5,
        "file_3": (config.updates, config.ema_beta) == (100, 0.98), "file_4": config.ema_device == "same",
        "file_5": config.lr_schedule == "constant", "file_8": config.processes == 8,
        "file_9": config.model_version == "d48w1024-sdxl1024",
    }[name]  # fmt: skip


@pytest.mark.parametrize("name", ["constant", "cosine_decay", "steps_with_decay"])
def test_learning_rates_are_those_of_the_reference(name):
    call = {call["name"]: call for call in load_case("nova/lr_schedules")[0]["calls"]}[name]
    given = call["kwargs"]
    solver = {
        "BASE_LR": given["lr_max"], "MIN_LR": given.get("lr_min", 0.0), "MAX_STEPS": given.get("max_steps", 1001),
        "WARM_UP_STEPS": given["warmup_steps"], "WARM_UP_FACTOR": given["warmup_factor"],
        "DECAY_STEPS": given.get("decay_steps", []), "DECAY_GAMMA": given.get("decay_gamma", 0.5),
        "LR_POLICY": "" if name == "constant" else name,
    }  # fmt: skip
    theirs = {"PIPELINE": {"TYPE": "nova_train_t2i"}, "SOLVER": solver, "TRAIN": {"DATASET": "x"}}
    values = convert(theirs, {}).values | {"experiment_id": "a", "checkpoint_path": "b"}
    config = NovaConfig(**values)
    for step, expected in call["result"].items():
        if int(step) >= config.updates:
            continue
        found = lr_at(
            int(step) + 1, schedule=config.lr_schedule, lr=config.lr, warmup_updates=config.warmup_updates,
            updates=config.updates, min_lr_ratio=config.min_lr_ratio, cycles=config.lr_cycles,
        )  # fmt: skip
        # Ours warm up from 0, and a cosine begins an update earlier.
        exact = name == "steps_with_decay"
        assert found == pytest.approx(expected, rel=1e-9 if exact else 0, abs=0 if exact else 2e-3 * config.lr)


ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("deepspeed", "keys", "named"),
    [
        ({"zero_optimization": {"stage": 0}}, {"use_fsdp": False}, []),
        ({"zero_optimization": {"stage": 1}}, {"use_fsdp": True}, ["stage 1 becomes use_fsdp"]),
        ({"zero_optimization": {"stage": 3}}, {"use_fsdp": True, "fsdp_cpu_offload": False}, []),
        (
            {
                "zero_optimization": {
                    "stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True},
                },
                "gradient_clipping": 1.5, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 3,
                "train_batch_size": "auto", "steps_per_print": 50, "optimizer": {"type": "Adam"},
            },
            {"use_fsdp": True, "fsdp_cpu_offload": True, "clip_grad_norm": 1.5, "dtype": "bfloat16"},
            ["overlap_comm: FSDP gathers", "offload_optimizer.pin_memory: fsdp_cpu_offload has",
             "steps_per_print: nothing here has such a setting", "optimizer.type: the other program gives",
             "bf16.enabled: dtype says what is computed in; weights"],
        ),
        (
            {"zero_optimization": {
                "stage": 3, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "none"},
            }},
            {"fsdp_cpu_offload": False}, ["offload_param.device: fsdp_cpu_offload moves to the CPU alone"],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {"use_fsdp": False, "fsdp_cpu_offload": False}, ["offload_optimizer.device: fsdp_cpu_offload moves"],
        ),
        ({**ZERO, "fp16": {"enabled": True, "loss_scale": 0}}, {"dtype": "float16"}, ["fp16.loss_scale: float16"]),
    ],
)  # fmt: skip
def test_zero_becomes_fsdp(tmp_path, deepspeed, keys, named):
    config, text = written(tmp_path, GUIDE, deepspeed=deepspeed)
    assert {key: getattr(config, key) for key in keys} == keys
    said = " ".join(text.replace("#", "").split())
    assert all(one in said for one in named)
    config, text = written(tmp_path, GUIDE | {"NUM_GPUS": 1}, deepspeed=deepspeed)
    assert not config.use_fsdp
    assert "with NUM_GPUS: 1 it is not used there, either" in text


@pytest.mark.parametrize(
    ("changes", "deepspeed", "message"),
    [
        ({"PIPELINE": {"TYPE": "nova_train_x"}}, None, "PIPELINE.TYPE: found 'nova_train_x'; there is nova_t"),
        ({"MODEL": {"TYPE": "vae"}}, None, "MODEL.TYPE: found 'vae'; only the transformer"),
        ({"MODEL": {"PRECISION": "int8"}}, None, "MODEL.PRECISION: found 'int8'; there is bfloat16"),
        ({"MODEL": {"CONFIG": {"arch": ["a", "b", "c"]}}}, None, "MODEL.CONFIG: no network here has these"),
        ({"MODEL": {"CONFIG": {"image_dim": 8}}}, None, "MODEL.CONFIG.image_dim: found 8, but model_version"),
        ({"MODEL": {"CONFIG": {"video_base_size": [9, 15, 24]}}}, None, r"video_base_size: found \[9, 15, 24\], but"),
        ({"MODEL": {"CONFIG": {"image_base_size": 30}}}, None, "image_base_size: found 30, where a list of 2 is"),
        ({"MODEL": {"WEIGHTS": "w/nova-d48w1024-sdxl1024"}}, None, "t2v trains on clips, but weights or MODEL.CONFIG"),
        ({"PIPELINE": {"TYPE": "nova_train_c2i"}, "MODEL": {}}, None, "nova_train_c2i has no usual network: say in M"),
        ({"SOLVER": {"OPTIMIZER": "SGD"}}, None, "SOLVER.OPTIMIZER: found 'SGD'; there is AdamW"),
        ({"SOLVER": {"BASE_LR": 0}}, None, "SOLVER.BASE_LR: found 0, where a number above 0"),
        ({"SOLVER": {"BASE_RL": 1}}, None, "SOLVER.BASE_RL: no key .*; did you mean SOLVER.BASE_LR"),
        ({"SOLVER": {"DECAY_STEPS": [1, 2], "LR_POLICY": "steps_with_decay"}}, None, "DECAY_STEPS: found .1, 2., wh"),
        ({"SOLVER": {"DECAY_STEPS": [2, 1], "LR_POLICY": "steps_with_decay"}}, None, "DECAY_STEPS: found .2, 1."),
        ({"SOLVER": {"LR_POLICY": "poly"}}, None, "SOLVER.LR_POLICY: found 'poly'; there is cosine_decay"),
        ({"NUM_GPUS": True}, None, "NUM_GPUS: found True, where a whole number"),
        ({"NUM_GPUS": 0}, None, "NUM_GPUS: found 0, where a number above 0"),
        ({"TRAIN": {"DATASET": "x", "CHECKPOINTING": 7}}, None, "activation_checkpointing: found 7"),
        ({"TRAIN": {"BATCH_SIZE": 2}}, None, "webdataset_path: this key is required"),
        ({}, {"zero_optimization": {"stage": 4}}, "zero_optimization.stage: found 4; there is 0, 1, 2, 3"),
        ({}, {"train_batch_size": 47}, "train_batch_size: found 47, but the training says 48"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(tmp_path, changes, deepspeed, message):
    with pytest.raises(UserError, match=message):
        written(tmp_path, GUIDE | changes, deepspeed=deepspeed)
    assert not (tmp_path / "ours.yaml").exists()


def test_keys_without_an_effect_are_named(tmp_path):
    theirs = GUIDE | {"SOLVER": {"MIN_LR": 1e-6, "DECAY_STEPS": [5], "EMA_EVERY": 7}, "GPU_ID": 1}
    theirs["TRAIN"] = theirs["TRAIN"] | {"MODEL_EMA": 0, "DATASET2": "more"}
    config, text = written(tmp_path, theirs)
    assert (config.ema_start_iters, config.lr_schedule) == (None, "constant")
    for line in (
        "SOLVER.MIN_LR: it has no effect there, either, with SOLVER.LR_POLICY: ''",
        "SOLVER.DECAY_STEPS: it has no effect there", "SOLVER.EMA_EVERY: without TRAIN.MODEL_EMA there is no average",
        "GPU_ID: the environment variable", "TRAIN.DATASET2: a tar has all fields of a sample",
    ):  # fmt: skip
        assert line in text


def test_a_configuration_of_no_program_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"theirs.yaml is the configuration of no program that a family knows here"):
        written(tmp_path, {"model": {"lr": 1}})


def test_networks_and_captions_follow_the_folders_that_are_there(tmp_path):
    weights, records = tmp_path / "w", tmp_path / "records"
    for folder in (weights / "transformer", records):
        folder.mkdir(parents=True)
    network = {key: list(value) if isinstance(value, tuple) else value
               for key, value in VERSIONS["d48w768-sdxl1024"].network.items()}  # fmt: skip
    (weights / "transformer" / "config.json").write_text(json.dumps(network), encoding="utf-8")
    about = {"entries": 1, "features": {"caption": {"data": "BYTES", "shape": ["INT64"]}}, "version": 1}
    (records / "METADATA").write_text(json.dumps(about), encoding="utf-8")
    theirs = {
        "PIPELINE": {"TYPE": "nova_train_t2i", "MODULES": {"vae": "other_vae", "scheduler": "s", "tokenizer": "t"}},
        "MODEL": {"WEIGHTS": str(weights), "CONFIG": {"video_mixer_rank": 24}}, "TRAIN": {"DATASET": str(records)},
    }  # fmt: skip
    config, text = written(tmp_path, theirs)
    assert (config.model_version, config.video_mixer_rank) == ("d48w768-sdxl1024", 24)
    assert config.autoencoder_checkpoint_path == Path("other_vae")
    assert config.captions_getter == ("key", "identity")
    assert "PIPELINE.MODULES.scheduler: diffusion_target and shift" in text
    theirs["TRAIN"]["DATASET"] = "elsewhere"
    assert written(tmp_path, theirs)[0].captions_getter[0] == ["txt", "json.text"]
