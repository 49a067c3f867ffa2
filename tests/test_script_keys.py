"""What `--help` of every script shows: its own keys and no other; a key without use is refused."""

import importlib
import re
from pathlib import Path

import pytest

from families.registry import families
from warpcore.config import Config, ConfigError, Settings, load_config
from warpcore.keys import describe
from warpcore.mistakes import OTHER_NAMES, keys_meant

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("train", "inference", "tools")
    for path in (ROOT / folder).glob("*.py")
    if re.search(r"load_task\(|\.main\(\)", path.read_text())
)
"""Those that have keys of their own; the other tools take the keys of the script that they are given."""
TRAINING = (
    "experiment_id checkpoint_path output_path model_version wandb_project wandb_entity lr batch_size image_size "
    "multi_aspect_ratio grad_accum_steps updates backup_every save_every warmup_updates use_fsdp webdataset_path "
    "effnet_checkpoint_path generator_checkpoint_path dataset_filters captions_getter bucketeer_random_ratio "
    "adaptive_loss_weight ema_start_iters ema_iters ema_beta clip_text_model_name dtype allow_tf32"
)
PUBLISHED = {
    "train_b": f"{TRAINING} stage_a_checkpoint_path shift",
    "train_c": f"{TRAINING} previewer_checkpoint_path clip_image_model_name",
    "train_c_controlnet": f"{TRAINING} previewer_checkpoint_path offset_noise controlnet_blocks controlnet_filter "
    "controlnet_filter_params controlnet_bottleneck_mode",
    "train_c_lora": f"{TRAINING} previewer_checkpoint_path module_filters rank train_tokens",
}
"""The keys of the published training configs, by the script that takes their place."""


def config_of(script: Path) -> type[Settings]:
    """The class of keys of a use case, or of a task of the first family that has it."""
    module = importlib.import_module(".".join(script.with_suffix("").parts))
    if script.parts[0] == "inference":
        return next(config for family in families() if (config := family.config_of(module.TASK)) is not None)
    own = [kind for kind in vars(module).values() if getattr(kind, "__module__", "") == module.__name__]
    return next(kind.Config for kind in own if hasattr(kind, "Config"))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help_shows_the_keys_of_the_script_in_sections(script, capsys):
    kind = config_of(script)
    with pytest.raises(SystemExit) as ended:
        load_config(kind, ["--help"])
    assert ended.value.code == 0
    blocks = capsys.readouterr().out.split("\n\n")
    assert blocks[0].startswith("usage: ")
    shown = {}
    for block in "\n\n".join(blocks[1:]).split("\n\n"):
        title, *lines = block.splitlines()
        assert title == title.upper()
        keys = [line for line in lines if not line.startswith("    ")]
        shown |= {re.match(r"(\w+) \((.+)", key)[1]: (key, title) for key in keys if re.match(r"\w+ \(", key)}
    assert shown.keys() == kind.model_fields.keys() - kind.unused
    for name, of_type, default, sentence in describe(kind):
        assert shown[name][0] == f"{name} ({of_type}{default})"
        assert default
        assert sentence.endswith(".")
    if issubclass(kind, Config):
        titles = {title for _, title in shown.values()}
        assert {"THE RUN", "OPTIMISATION", "AVERAGE OF THE WEIGHTS", "DATA", "WHAT IS REPORTED"} <= titles
        assert shown["lr"][1] == "OPTIMISATION"


UNUSED_VALUES = {
    "captions_getter": "[json, identity]", "diffusion_target": "v", "multires_noise_iterations": 2,
    "multires_noise_discount": 0.5, "repa": "true", "tread": "true", "masked_loss": "true",
    "cache_text": "true", "caption_dropout": 0.5, "shuffle_tags": "true", "tag_dropout": 0.5,
    "caption_templates": "['a {caption}']", "cache_text_gb": 1, "keep_tags": 1,
    "offset_noise": 0.5, "input_perturbation": 0.5, "adaptive_loss_weight": "true", "sample_sampler": "ddim",
    "sampler": "ddim",
}  # fmt: skip


@pytest.mark.parametrize("script", [path for path in SCRIPTS if config_of(path).unused], ids=str)
def test_a_key_without_use_is_refused_and_its_file_is_named(script, tmp_path):
    kind = config_of(script)
    needed = [f"{name}=1" for name, field in kind.model_fields.items() if field.is_required()]
    further = {"run": "[]", "stage_a_only": "true", "generator_checkpoint_path": "a.safetensors", "num_frames": "1"}
    further |= {"prompts": "a"}
    further |= {"batch_size": "1"} if "num_frames" in kind.model_fields else {}
    needed += [f"{name}={further[name]}" for name in further.keys() & kind.model_fields.keys() - kind.unused]
    for key in kind.unused:
        value = UNUSED_VALUES.get(key, "somewhere.safetensors")
        (tmp_path / "c.yaml").write_text(f"{key}: {value}\n")
        with pytest.raises(ConfigError, match=f"{key}: this script has no use for it; remove it from .*c.yaml"):
            load_config(kind, [str(tmp_path / "c.yaml"), *needed])


def test_every_script_with_keys_is_found():
    assert {path.stem for path in SCRIPTS} >= {*PUBLISHED, "train_a", "train_encoder", "train_towers", "reconstruct"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_the_published_configs_are_known_and_used(name):
    kind = config_of(Path("train", f"{name}.py"))
    assert set(PUBLISHED[name].split()) <= kind.model_fields.keys() - kind.unused


def test_names_of_other_trainers_stand_for_keys_that_there_are():
    every = {key for script in SCRIPTS for key in config_of(script).model_fields}
    assert {*OTHER_NAMES.values()} <= every
    assert keys_meant("learning_rate", ["lr", "ema_rate"]) == ["lr"]
    assert keys_meant("learning_rate", ["ema_rate"]) == ["ema_rate"]
