"""Configs that start from others: which value wins, and errors that name the files."""

from pathlib import Path

import pytest
import yaml

from tests.warpcore.runs import finish, start, tiny_settings, write_shard
from warpcore.config import Config, ConfigError, load_config
from warpcore.errors import UserError

NEEDED = {"experiment_id": "a", "checkpoint_path": "runs", "updates": 10, "batch_size": 8, "webdataset_path": "a.tar"}


@pytest.fixture
def write(tmp_path):
    """Writes config files: by file name, their keys."""

    def files(**configs: dict) -> Path:
        for name, keys in configs.items():
            path = tmp_path / name.replace("__", "/")
            path.parent.mkdir(exist_ok=True)
            path.with_suffix(".yaml").write_text(yaml.safe_dump(keys))
        return tmp_path

    return files


def test_later_bases_win_and_the_file_and_the_command_line_win_over_them(write):
    folder = write(
        common=NEEDED | {"seed": 1, "lr": 1.0, "updates": 1, "weight_decay": 1.0},
        shared__first={"base": "../common.yaml", "lr": 2.0, "updates": 2, "weight_decay": 2.0},
        second={"updates": 3, "weight_decay": 3.0},
        run={"base": ["shared/first.yaml", "second.yaml"], "weight_decay": 4.0, "eps": 1.0},
    )
    config = load_config(Config, [str(folder / "run.yaml"), "eps=5"])
    assert (config.seed, config.lr, config.updates, config.weight_decay, config.eps) == (1, 2.0, 3, 4.0, 5.0)


def test_a_mapping_and_a_list_replace_those_of_a_base_and_null_takes_a_value_away(write):
    base = NEEDED | {"grad_norm_groups": {"a": "a", "b": "b"}, "betas": [0.1, 0.2], "wandb_project": "p"}
    base |= {"image_size": 64, "lr_schedule": "cosine", "clip_grad_norm": 3.0}
    taken = dict.fromkeys(("wandb_project", "image_size", "lr_schedule", "clip_grad_norm"))
    folder = write(base=base, run={"base": "base.yaml", "grad_norm_groups": {"c": "c"}} | taken)
    config = load_config(Config, [str(folder / "run.yaml"), "grad_norm_groups.d=d"])
    assert (config.image_size, config.lr_schedule, config.clip_grad_norm) == (1024, "constant", None)
    assert config.grad_norm_groups == {"c": "c", "d": "d"}
    assert (config.betas, config.wandb_project) == ((0.1, 0.2), None)


def test_paths_in_a_base_are_relative_to_where_the_script_is_started(write):
    folder = write(shared__base=NEEDED | {"output_path": "out"}, run={"base": "shared/base.yaml"})
    assert load_config(Config, [str(folder / "run.yaml")]).output_path == Path("out")


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        ({"run": {"base": "a.yaml"}, "a": {"base": "b.yaml"}, "b": {"base": "a.yaml"}},
         "its own bases: .*run.yaml -> .*a.yaml -> .*b.yaml -> .*a.yaml"),
        ({"run": {"base": "run.yaml"}}, "its own bases: .*run.yaml -> .*run.yaml"),
        ({"run": {"base": "a.yaml"}, "a": {"base": "gone.yaml"}},
         "gone.yaml does not exist .base: .*run.yaml -> .*a.yaml -> .*gone.yaml"),
        ({"run": {"base": [3]}}, r"base: found \[3\] in .*run.yaml; write the name of a config file"),
        ({"run": {"base": "s3://bucket/a.yaml"}}, "s3://bucket/a.yaml is a URL"),
        ({"run": {"base": "a.yaml"}, "a": NEEDED | {"batch_sise": 4}},
         "batch_sise: unknown key in .*a.yaml; did you mean batch_size?"),
        ({"run": NEEDED | {"image_size": 10**6}}, r"wrong:\n  image_size: found .* 32768 \(expected[^\n]*\Z"),
        ({"run": NEEDED | {"betas": 0.9}}, r"betas: found 0.9 in .*run.yaml, but a list in brackets is needed"),
        ({"run": NEEDED | {"learning_rate": 1e-4}}, "learning_rate: unknown key in .*run.yaml; did you mean lr?"),
        ({"run": NEEDED | {"base": "a.yaml"}, "a": {"lr": "fast"}}, "lr: found 'fast' in .*a.yaml, but"),
        ({"run": NEEDED | {"base": "a.yaml"}, "a": {"dataset_filters": None}}, "found null in .*a.yaml; write"),
    ],
)  # fmt: skip
def test_an_error_names_the_files(write, configs, told):
    folder = write(**configs)
    with pytest.raises(UserError, match=told):
        load_config(Config, [str(folder / "run.yaml")])


def test_a_value_of_the_command_line_is_of_no_file(write):
    folder = write(run=NEEDED | {"lr": 1.0})
    with pytest.raises(ConfigError, match="lr: found 'fast', but"):
        load_config(Config, [str(folder / "run.yaml"), "lr=fast"])
    with pytest.raises(ConfigError, match="base: only a config file may start from others"):
        load_config(Config, [str(folder / "run.yaml"), "base=other.yaml"])


def test_two_ways_to_one_base_are_no_loop(write):
    folder = write(
        common=NEEDED, left={"base": "common.yaml", "lr": 2.0}, right={"base": "common.yaml"},
        run={"base": ["left.yaml", "right.yaml"]},
    )  # fmt: skip
    assert load_config(Config, [str(folder / "run.yaml")]).lr == 2.0


@pytest.mark.integration
def test_a_run_prints_what_its_configs_come_to_and_saves_it_without_them(write, tmp_path):
    settings = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 8), updates=1, ema_start_iters=None)
    folder = write(base=settings | {"lr": 0.5, "lr_schedule": "linear"}, run={"base": "base.yaml", "lr": 0.25})
    process = start({}, arguments=(str(folder / "run.yaml"), "seed=7"))
    status, output = finish(process)
    assert status == 0, output
    printed = output.partition("keys that are not at their defaults:\n")[2]
    assert "lr: 0.25" in printed
    assert "lr_schedule: linear" in printed
    assert "seed: 7" in printed
    assert "weight_decay" not in printed
    assert f"python3 tools/runs.py {tmp_path / 'runs'}\n" in printed
    saved = yaml.safe_load((tmp_path / "runs/tiny/config.yaml").read_text())
    assert "base" not in saved
    assert (saved["lr"], saved["seed"], saved["lr_schedule"], saved["weight_decay"]) == (0.25, 7, "linear", 0.01)


GROUPS = {
    "optimizer": {"optimizer": "lion", "lr": 3e-5, "betas": [0.9, 0.99]},
    "scheduler": {"lr_schedule": "cosine", "warmup_updates": 5},
    "checkpoint": {"checkpoint_path": "elsewhere", "save_every": 7, "keep_last": 3},
    "callbacks": {"log_every": 3, "tensorboard": True},
    "data": {"webdataset_path": "b.tar", "num_workers": 0},
    "model": {"use_fsdp": True, "fsdp_shards": 2, "activation_checkpointing": 2},
}


@pytest.mark.parametrize("order", [list(GROUPS), [*GROUPS][::-1], [*GROUPS][3:] + [*GROUPS][:3]])
def test_groups_of_keys_are_bases_in_any_order(write, order):
    """No group is a config by itself; where two say the same key, the later one wins."""
    groups = {name: f"{name}.yaml" for name in order}
    folder = write(**GROUPS, needed=NEEDED, run={"base": ["needed.yaml", *groups.values()], "experiment_id": "run"})
    config = load_config(Config, [str(folder / "run.yaml")])
    found = config.model_dump(mode="json")
    assert all(found[key] == value for keys in GROUPS.values() for key, value in keys.items())
    assert config.experiment_id == "run"


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"a": {"optimiser": "lion"}}, "optimiser.*a.yaml"),
        ({"a": {"dtype": "float16"}, "b": {"weights_dtype": "bfloat16"}}, "weights_dtype: bfloat16 needs"),
        ({"a": {"fsdp_shards": 2}}, "fsdp_shards and fsdp_cpu_offload need use_fsdp: true"),
    ],
)
def test_groups_that_do_not_fit_are_named(write, groups, told):
    folder = write(**groups, run=NEEDED | {"base": [f"{name}.yaml" for name in groups]})
    with pytest.raises(ConfigError, match=told):
        load_config(Config, [str(folder / "run.yaml")])
