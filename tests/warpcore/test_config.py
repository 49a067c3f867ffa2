"""Configuration: understood where it can be, refused with the fix named where it cannot."""

import importlib
import re
from pathlib import Path
from textwrap import indent
from typing import ClassVar

import pytest
import yaml

from families.cascade.config import StageCConfig
from families.cascade.reconstruction import CascadeReconstructConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from families.common.config import DiffusionConfig
from warpcore.batch_size import split_batch
from warpcore.config import Config, ConfigError, dump_config, load_config, make_config
from warpcore.core import WarpCore
from warpcore.errors import UserError
from warpcore.keys import describe
from warpcore.safe_yaml import parse_yaml

GIVEN = {
    "experiment_id": "test", "checkpoint_path": "runs", "updates": 10, "batch_size": 8, "webdataset_path": "a.tar",
}  # fmt: skip
CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "training").glob("*.yaml"))


def refusal(**changes) -> str:
    with pytest.raises(ConfigError) as error:
        make_config(Config, GIVEN | changes)
    return str(error.value)


def test_the_file_is_read_and_the_command_line_overrides_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(GIVEN) + "lr: 1e-4\nmulti_aspect_ratio: [1/1, 9/16, 16:9]\ncaptions_getter: [txt, identity]\n"
    )
    config = load_config(Config, [str(path), "lr=3e-5", "grad_norm_groups.qk=in_proj_weight\\.(q|k)"])
    assert config.lr == 3e-5
    assert config.multi_aspect_ratio == [1.0, 9 / 16, 16 / 9]
    assert config.captions_getter == ("txt", "identity")
    assert config.grad_norm_groups == {"qk": "in_proj_weight\\.(q|k)"}


def test_arguments_may_be_written_as_options():
    given = [f"{key}={value}" for key, value in GIVEN.items()]
    options = ["--lr", "3e-5", "--multi-aspect-ratio", "1/1", "--multi-aspect-ratio=9/16", "--grad-norm-groups.a", "b"]
    config = load_config(Config, [*options, *given])
    assert (config.lr, config.multi_aspect_ratio) == (3e-5, [1.0, 9 / 16])
    assert config.grad_norm_groups == {"a": "b"}
    assert load_config(Config, [*given, "multi_aspect_ratio=null"]).multi_aspect_ratio is None
    assert load_config(Config, [*given, "--webdataset_path", "b.tar"]).webdataset_path == "b.tar"
    for arguments in (["--lr"], ["--"], [*given, "config.yaml"], ["=3"]):
        with pytest.raises(ConfigError, match="write "):
            load_config(Config, arguments)


def test_yaml_text_that_looks_like_a_number_is_one():
    assert make_config(Config, GIVEN | {"lr": "1e-4"}).lr == 1e-4


def test_the_resolved_config_reads_back_equal():
    config = make_config(StageCConfig, GIVEN | {"dataset_filters": [[["width", "height"], "lambda w, h: w > h"]]})
    assert make_config(StageCConfig, yaml.safe_load(dump_config(config))) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_sise": 4}, ["batch_sise", "batch_size?"]),
        ({"updates": "ten"}, ["updates", "'ten'", "integer"]),
        ({"batch_size": True}, ["batch_size", "number"]),
        ({"lr": -1}, ["lr", "-1", "greater than 0"]),
        ({"optimizer": "sgd"}, ["optimizer", "'sgd'", "adamw"]),
        (
            {"validation_path": "b.tar", "validation_samples": 3},
            ["validation_path", "validation_samples", "remove one"],
        ),
        ({"multi_aspect_ratio": ["1/0"]}, ["multi_aspect_ratio", "1/0"]),
        ({"betas": [0.9, 1.5]}, ["betas", "1.5", "less than 1"]),
        ({"lr": float("nan")}, ["lr", "finite"]),
        ({"background": [300, 0, 0]}, ["background", "300", "255"]),
        ({"experiment_id": "../.."}, ["experiment_id", "'../..'"]),
        ({"dataset_filters": [["a"]]}, ["dataset_filters", "['a']"]),
        ({"updates": 0}, ["updates", "greater than 0"]),
    ],
)
def test_a_mistake_names_the_key_what_was_found_and_what_to_write(changes, words):
    message = refusal(**changes)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((Config, key) for key in ("output_path", "scratch_path", "cache_path")),
        *((StageCConfig, key) for key in ("generator_checkpoint_path", "clip_text_model_name")),
        *((CascadeTextToImageConfig, key) for key in ("run", "lora", "controlnet", "image", "output_path")),
        (CascadeReconstructConfig, "pictures"),
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/a.safetensors", "file:///a", Path("s3://bucket/b")])
def test_a_url_is_refused_where_a_path_is_needed(kind, key, url):
    for value in (url, ["a", url]):
        with pytest.raises(
            ConfigError, match=f"^{key}: {url} is a URL, but a path of this machine is needed"
        ) as error:
            make_config(kind, {key: value})
        assert ("aws s3 cp" in str(error.value)) == str(url).startswith("s3")


def test_only_urls_of_s3_hold_checkpoints():
    assert make_config(Config, GIVEN | {"checkpoint_path": "s3://bucket/runs"}).run_url == "s3://bucket/runs/test"
    assert "checkpoint_path: file:///runs is a URL" in refusal(checkpoint_path="file:///runs")


def test_a_missing_file_and_a_missing_key_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(Config, [str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ConfigError, match="experiment_id: this key is required"):
        load_config(Config, ["updates=3"])


def test_help_prints_every_key_with_its_sentence(capsys):
    with pytest.raises(SystemExit):
        load_config(StageCConfig, ["--help"])
    printed = capsys.readouterr().out
    for name, _, _, sentence in describe(StageCConfig):
        assert sentence.endswith("."), f"{name} has no sentence"
        assert f"{name} (" in printed
        assert f"\n{indent(sentence, '    ')}\n" in f"{printed}\n"


def test_the_keys_of_the_public_training_configs_load():
    public = GIVEN | {
        "output_path": "out", "model_version": "3.6B", "wandb_project": "p", "wandb_entity": "e", "lr": 1e-4,
        "image_size": 768, "multi_aspect_ratio": ["1/1", "1/2", "2/3", "9/16"], "grad_accum_steps": 1,
        "backup_every": 20000, "save_every": 2000, "warmup_updates": 1, "use_fsdp": True, "ema_start_iters": 5000,
        "ema_iters": 100, "ema_beta": 0.9, "adaptive_loss_weight": True, "bucketeer_random_ratio": 0.05,
        "webdataset_path": ["s3://bucket/first/{00000..00041}.tar", "file:/data/b.tar"],
        "effnet_checkpoint_path": "models/effnet_encoder.safetensors",
        "previewer_checkpoint_path": "models/previewer.safetensors",
        "generator_checkpoint_path": "models/stage_c_bf16.safetensors",
        "dataset_filters": [["aesthetic_score", "lambda s: s > 4.5"]], "captions_getter": ["json", "lambda j: j['a']"],
        "clip_image_model_name": "openai/clip-vit-large-patch14", "dtype": "bfloat16", "allow_tf32": True,
        "clip_text_model_name": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    }  # fmt: skip
    assert make_config(StageCConfig, public).multi_aspect_ratio[1] == 0.5


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_in_the_script_that_it_names(path):
    script = re.search(r"train/(\w+)\.py configs/training/" + path.name, path.read_text()).group(1)
    use_case = importlib.import_module(f"train.{script}")
    own = [kind for kind in vars(use_case).values() if isinstance(kind, type) and kind.__module__ == use_case.__name__]
    load_config(next(kind for kind in own if issubclass(kind, WarpCore)).Config, [str(path)])


def split(num_processes=1, saved=None, **keys):
    return split_batch(make_config(Config, GIVEN | keys), num_processes, saved)


def test_accumulation_follows_from_the_batch_sizes():
    assert split() == (8, 1)
    assert split(grad_accum_steps=4) == (2, 4)
    assert split(micro_batch_size=2) == (2, 4)
    assert split(num_processes=2, micro_batch_size=2) == (2, 2)
    assert split(num_processes=2, saved={"micro_batch_size": 1}) == (1, 4)


@pytest.mark.parametrize(
    ("num_processes", "keys", "words"),
    [
        (3, {}, ["batch_size 8", "3 processes", "6 or 9"]),
        (1, {"micro_batch_size": 3}, ["micro_batch_size 3", "1 or 2 or 4 or 8"]),
        (2, {"micro_batch_size": 2, "grad_accum_steps": 4}, ["grad_accum_steps 4", "= 2", "remove"]),
    ],
)
def test_a_batch_that_does_not_divide_says_what_would(num_processes, keys, words):
    with pytest.raises(ValueError, match="batch_size") as error:
        split(num_processes, **keys)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("processes", "batch", "words"),
    [(2, 8, ["start 1 process,", "batch_size: 16", "micro_batch_size: 4"]),
     (2, 12, ["2 processes: write", "batch_size: 16", "on_data_change: new_epoch", "micro_batch_size: 6"]),
     (4, 48, ["start 1 or 2 or 3 or 6 processes,", "batch_size: 64", "micro_batch_size: 12"])],
)  # fmt: skip
def test_a_resumed_run_of_too_large_micro_batches_says_what_can_be_changed(processes, batch, words):
    with pytest.raises(UserError, match=f"micro-batches of 8 that the run began with x {processes} proc") as error:
        split(num_processes=processes, saved={"micro_batch_size": 8}, batch_size=batch)
    assert all(word in str(error.value) for word in words), error.value


def test_processes_that_share_their_samples_are_counted_in_groups():
    class Together(Config):
        processes_per_sample: ClassVar = 2

    def refused(**given):
        with pytest.raises(UserError) as error:
            split_batch(make_config(Together, GIVEN | given), 3, {"micro_batch_size": 8} if given else None)
        return str(error.value)

    assert "batch_size 8 does not divide by 3 groups of 2 (sequence_shards) processes x 1" in refused()
    told = refused(batch_size=16)
    assert "the run began with x 3 groups of 2 (sequence_shards) processes: start 2 or 4 processes, or write" in told


def test_the_two_names_of_a_loss_weight_may_not_contradict_each_other():
    with pytest.raises(ConfigError, match="adaptive_loss_weight contradicts loss_weight: min_snr"):
        make_config(StageCConfig, GIVEN | {"adaptive_loss_weight": True, "loss_weight": "min_snr"})


def drawn(*arguments: str) -> CascadeTextToImageConfig:
    return load_config(CascadeTextToImageConfig, [*arguments, "generator_checkpoint_path=c.safetensors"])


@pytest.mark.parametrize("text", ["007", "1e3", "16:9", "2024-01-01", "no", "1_0"])
def test_text_of_the_command_line_and_of_a_file_stays_as_it_was_written(text, tmp_path):
    rest = [f"{key}={value}" for key, value in GIVEN.items() if key != "experiment_id"]
    if text != "16:9":  # no name of a run
        assert load_config(Config, [*rest, f"experiment_id={text}"]).experiment_id == text
    assert drawn("prompts=a", f"negative_prompt={text}").negative_prompt == text
    assert drawn("--prompts", text, "--prompts", "a dog: [big]").prompts == [text, "a dog: [big]"]
    assert drawn(f"prompt_file={text}").prompt_file == Path(text)
    assert load_config(Config, [*rest, "experiment_id=a", f"grad_norm_groups.a={text}"]).grad_norm_groups == {
        "a": text
    }
    path = tmp_path / "config.yaml"
    path.write_text(f"prompts: [{text!r}, 16:9, 007, 2024-01-01]\n")
    assert drawn(str(path)).prompts == [text, "16:9", "007", "2024-01-01"]


def test_a_prompt_in_brackets_is_a_text_or_a_list_and_never_the_other_unseen():
    for argument in (["--prompts", "[dog]"], ["prompts=[dog]"], ["prompts= [ dog ]"]):
        with pytest.raises(ConfigError) as error:
            drawn(*argument)
        assert """prompts='["[dog]"]'""" in str(error.value)
        assert """prompts='["dog"]'""" in str(error.value)
    assert drawn('prompts=["[dog]"]').prompts == ["[dog]"]
    assert drawn('prompts=["dog"]').prompts == ["dog"]
    assert drawn("prompts=['a b', c]").prompts == ["a b", "c"]
    assert drawn("prompts=[dog] on a beach").prompts == ["[dog] on a beach"]
    with pytest.raises(ConfigError, match="is not valid YAML") as error:
        drawn("prompts=[dog] and [cat]")
    assert """write prompts='["[dog] and [cat]"]'""" in str(error.value)


def test_a_name_of_a_place_in_brackets_is_a_list():
    rest = [f"{key}={value}" for key, value in GIVEN.items()]
    for argument in ("caches=[data/texts]", 'caches=["data/texts"]', "caches=data/texts"):
        assert load_config(DiffusionConfig, [*rest, argument]).caches == ["data/texts"]
    assert load_config(DiffusionConfig, [*rest, "caches=[data/latents, data/texts]"]).caches[1] == "data/texts"
    assert drawn("prompts=a", "lora=[dog.safetensors:0.5]").lora == ["dog.safetensors:0.5"]


def test_numbers_are_understood_wherever_they_stand():
    source = {"path": "a.tar", "weight": "5e-1"}
    assert make_config(Config, GIVEN | {"webdataset_path": [source]}).webdataset_path[0]["weight"] == 0.5
    rest = [f"{key}={value}" for key, value in GIVEN.items()]
    config = load_config(Config, [*rest, "webdataset_path=[{path: a.tar, weight: 5e-1}]", "lr=1e-4", "updates=010"])
    assert (config.webdataset_path, config.lr) == ([source | {"weight": 0.5}], 1e-4)
    assert config.updates == 10
    assert load_config(Config, [*rest, "webdataset_path={a,b}.tar"]).webdataset_path == "{a,b}.tar"
    assert load_config(Config, [*rest, "output_path=null", "wandb_project="]).wandb_project is None
    assert drawn("prompts=a", "--aspect-ratio", "16:9").aspect_ratio == 16 / 9


def test_a_number_for_a_text_wants_quotes():
    assert "experiment_id: found 7, but input should be a valid string; put it in quotes" in refusal(experiment_id=7)


def test_null_for_a_list_or_a_mapping_says_how_to_write_none():
    assert "dataset_filters: found null; write [] for none" in refusal(dataset_filters=None)
    assert "grad_norm_groups: found null; write {} for none" in refusal(grad_norm_groups=None)
    with pytest.raises(ConfigError, match=r"prompts: found null; write \[\] for none"):  # no prompt "null"
        drawn("prompts=null")
    assert drawn('prompts=["null"]').prompts == ["null"]


def test_a_run_whose_name_is_the_same_number_is_named(tmp_path, caplog):
    (tmp_path / "7").mkdir()
    rest = [f"{key}={value}" for key, value in GIVEN.items()]
    load_config(Config, [*rest, f"checkpoint_path={tmp_path}", "experiment_id=7"])
    assert not caplog.messages
    load_config(Config, [*rest, f"checkpoint_path={tmp_path}", "experiment_id=007"])
    assert f"{tmp_path / '7'}: to go on with that one, write experiment_id=7" in caplog.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr: 1e-4\nlr: 2e-4\n", "lr stands there twice"),
        ("[a, b]: 1\n", "unhashable key"),
        ("validation_path: &a [*a]\n", "holds itself"),
        ("lr: &a {lr: *a}\n", "holds itself"),
        ("lr: " + "[" * 5000 + "]" * 5000, "nested more than 50 levels deep"),
        ("a: &a [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else '*a'] * 9)}]\n" for n in range(9)),
         "aliases of aliases"),
    ],
)  # fmt: skip
def test_a_config_that_says_a_thing_twice_or_never_ends_is_refused(tmp_path, text, told):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(GIVEN) + text)
    with pytest.raises(ConfigError, match=told):
        load_config(Config, [str(path)])


def test_what_a_config_merges_may_be_overridden():
    values = parse_yaml("base: &b {lr: 1}\nmiddle: &m {<<: *b, lr: 2}\nlast: {<<: *m, lr: 3}\n", "text")
    assert values == {"base": {"lr": 1}, "middle": {"lr": 2}, "last": {"lr": 3}}


@pytest.mark.parametrize(("key", "value"), [("background", [255, 255, True]), ("betas", [False, 0.9])])
def test_true_and_false_are_no_numbers_in_lists_either(key, value):
    assert "a number is needed, not true or false" in refusal(**{key: value})
