"""Configs that nobody meant: each ends soon, in one short error that names the key or the file."""

import json
import math
import os
import re
from collections.abc import Callable

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from families.common.library_files import CONFIG_KEY
from families.cosmos import versions as cosmos
from families.dit import pixart_versions
from families.dit import versions as dit_versions
from families.nova import versions as nova_versions
from modules.dit import DiT
from modules.nova import NOVATransformer
from modules.stdit3 import STDiT3
from tests.bounds import bounded, fuzz
from tools.config_reference import scripts, settings_of
from warpcore.arguments import read_arguments
from warpcore.batch_size import divisors, split_batch
from warpcore.config import Config, Settings, dump_config, load_config, make_config
from warpcore.config_files import read_config
from warpcore.data.buckets import Buckets
from warpcore.errors import ConfigError, UserError
from warpcore.keys import changed_keys
from warpcore.patterns import searching
from warpcore.safe_yaml import parse_yaml

GIVEN = {"experiment_id": "a", "checkpoint_path": "runs", "updates": 10, "batch_size": 8, "webdataset_path": "a.tar"}
LONGEST_MESSAGE = 10_000
KINDS = {f"{script} {kind.__name__}": kind for script in scripts() for kind in settings_of(script)}


def refusal(tmp_path, text: str | bytes, *arguments: str, kind: type[Settings] = Config) -> str:
    """The message about a config file, which comes within the bounds."""
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with bounded(tmp_path), pytest.raises(UserError) as error:
        load_config(kind, [str(path), *arguments])
    assert len(str(error.value)) < LONGEST_MESSAGE
    return str(error.value)


def aliases(first: str, times: int, levels: int) -> str:
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * times)}]" for n in range(1, levels)]
    return "\n".join(lines) + f"\nlr: *a{levels - 1}\n"


def merges(times: int, levels: int) -> str:
    lines = [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * times)}]}}" for n in range(1, levels)]
    return "\n".join(["a0: &a0 {k: v}", *lines])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (aliases("[x]", 9, 10), "by aliases of aliases"),
        (aliases(f"'{'x' * 400}'", 9, 6), "by aliases of aliases"),
        (aliases("x", 2, 200), "by aliases of aliases"),
        (aliases("x", 1, 200), "nested more than 50 levels deep, by aliases of aliases"),
        (merges(9, 12), "by aliases of aliases"),
        ("lr: &a {lr: *a}", "a holds itself"),
        ("lr: " + "[" * 100_000, "nested more than 50 levels deep"),
        ("- " * 100_000, "nested more than 50 levels deep"),
        ("a:\n" + "".join(" " * n + "a:\n" for n in range(1, 1000)), "nested more than 50 levels deep"),
        (f"%TAG !a! {'x' * 20_000}\n---\n[{'!a!b c, ' * 20_000}]", "means nothing here"),
        ("lr: !!python/object/apply:os.system [true]", "python/object/apply:os.system means nothing here"),
        ("lr: !!binary AAAA", "means nothing here"),
        ("lr: !!int ten", "ten is no int"),
        ("lr: !!bool maybe", "maybe is no bool"),
        ("updates: " + "9" * 5000, "updates: found '9+'?"),
        ("updates: 0x" + "F" * 5000, "updates: found '0xF+"),
        ("updates: 99999999999999999999", "updates: found 99999999999999999999.*, but integers go from"),
        ("updates: '99999999999999999999'", "updates: found '99999999999999999999' .*but integers go from"),
        ("updates: 1e300", "updates: found '?1e"),
        ("updates: 1.0e+300", "updates: found 1e.300"),
        ("updates: .inf", "updates: found inf.*finite"),
        ("lr: .nan", "lr: found nan.*finite"),
        ("lr: 1.0e+999", "lr: found inf.*finite"),
        ("lr: " + "9" * 1000 + ".0", "lr: found inf.*finite"),
        ("experiment_id: \"a\\0b\"", "experiment_id: found 'a.x00b' .*but text can't hold"),
        ("webdataset_path: [{path: \"a\\ud800\"}]", "webdataset_path: found .* half a character"),
        (f"experiment_id: {'a' * 300}", "experiment_id: found 'aaa.*, but a folder's name has at most"),
        (f"output_path: {'a' * 300}", "output_path: 'aaa.*is too long for a path"),
        ("webdataset_path: []", "webdataset_path: found .. .*but it names no data: write"),
        ("validation_path: ''", "validation_path: found .*it names no data"),
        ("image_size: 10000000", "image_size: found 10000000.*32768"),
        ("num_workers: 1000000", "num_workers: found 1000000.*1024"),
        ("processes: 1000000", "processes: found 1000000.*1024"),
        ("batch_size: 99999999999", "batch_size: found 99999999999.*10000000"),
        ("lanes: 1000000000", "lanes: found 1000000000.*100000"),
        ("process_timeout_seconds: 1.0e+300", "process_timeout_seconds: found 1e.300"),
        ("multi_aspect_ratio: [" + "1.5, " * 2000 + "]", "multi_aspect_ratio: .*at most 1000"),
        ("multi_aspect_ratio: [1.0e-320]", "multi_aspect_ratio: .*no ratio"),
        ("grad_norm_groups: {a: '('}", "grad_norm_groups: found .*it is no regular expression"),
        (f"grad_norm_groups: {{a: '{'(' * 900}'}}", "grad_norm_groups: found .*it is no regular expression"),
        (f"grad_norm_groups: {{a: '{'a' * 1001}'}}", "at most 1000 characters"),
        (f"{'k' * 1000}: 1", "^the configuration is wrong:\n  kkk.*1000 characters.: unknown key"),
        (f"{'k' * 100_000}: 1", "is not valid YAML"),
        ("1: 2", "1: .*"),
        ("dataset_filters: [" + "1, " * 5000 + "]", "dataset_filters: .*at most 1000 items"),
        ("caption_templates: [" + "1, " * 5000 + "]", "caption_templates: unknown key"),
        ("parameter_groups: [" + "1, " * 900 + "]", "parameter_groups: (?s:.*)and 880 more mistakes"),
        (b"lr: \xff\xfe\xfa", "not UTF-8 text"),
        (b"lr: 1\0", "a zero"),
        ("just text", "expected `key: value` lines, found a str"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_hostile_config_is_told_in_short(tmp_path, text, told):
    if not re.match(r"[%-]|a[:0]|b'|just", str(text)):
        text = text if isinstance(text, bytes) else yaml_without(text) + text
    assert re.search(told, refusal(tmp_path, text)), refusal(tmp_path, text)


def yaml_without(text: str) -> str:
    """The needed keys, but for that of the text."""
    return yaml.safe_dump({key: value for key, value in GIVEN.items() if not text.startswith(f"{key}:")})


def test_a_number_of_many_digits_is_text_where_a_text_is_wanted(tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GIVEN | {"experiment_id": None}).replace("null", "9" * 60))
    assert load_config(Config, [str(tmp_path / "c.yaml")]).experiment_id == "9" * 60


def test_a_config_of_an_ordinary_size_may_use_aliases(tmp_path):
    values = parse_yaml("a: &a [1, 2]\nb: {c: *a, d: *a}\n", "text")
    assert values == {"a": [1, 2], "b": {"c": [1, 2], "d": [1, 2]}}
    assert len(parse_yaml("[" + "x, " * 20_000 + "]", "text")) == 20_000


def test_configs_that_start_from_many_others_end_soon(tmp_path):
    for number in range(25):
        (tmp_path / f"{number}.yaml").write_text(f"base: [{number + 1}.yaml, {number + 1}.yaml]\n")
    with bounded(tmp_path), pytest.raises(ConfigError, match=r"more than 20 configs, .*0\.yaml -> .*1\.yaml"):
        read_config(tmp_path / "0.yaml")
    (tmp_path / "19.yaml").write_text("lr: 1.0\n")
    with bounded(tmp_path):
        assert read_config(tmp_path / "0.yaml")[0] == {"lr": 1.0}


@pytest.mark.parametrize(
    ("base", "told"),
    [
        ("loop.yaml", "does not exist"),
        ("pipe.yaml", "is a pipe"),
        ("/dev/zero", "is a device"),
        (".", "is a folder"),
        ("large.yaml", "20000000 bytes .base: .*: no config needs more than 10000000"),
        ('"a\\0b"', "base: found .*write the name of a config file"),
        ('"\\ud800"', "base: found .*write the name of a config file"),
        ("a" * 300, "does not exist"),
        ("[" + "run.yaml, " * 1000 + "]", "among its own bases"),
    ],
)
def test_a_base_that_is_no_file_of_a_config_is_refused(tmp_path, base, told):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(20_000_000)
    (tmp_path / "run.yaml").write_text(f"base: {base}\n")
    with bounded(tmp_path), pytest.raises(ConfigError, match=told):
        read_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("lr=" + "[" * 10_000, r"lr=\[\[.* is not valid YAML: nested more than"),
        ("lr=" + "9" * 100_000, "lr: found '999"),
        ("a" + ".a" * 10_000 + "=1", "nested 50 levels deep"),
        ("lr.a=1", "lr: found"),
        ("=1", "write key=value"),
        ("--", "write key=value"),
        ("x" * 100_000, "write a config file first"),
        ("dataset_filters=[" + "x" * 100_000 + "]", "dataset_filters: found"),
        ("columns=[" + "x" * 100_000 + "]", "a list, or a text in brackets"),
        ("base=a.yaml", "only a config file may start from others"),
        ("base.a=1", "only a config file may start from others"),
        ("webdataset_path.a=1", "webdataset_path is not a mapping"),
    ],
    ids=lambda value: value[:20],
)
def test_a_hostile_argument_is_told_in_short(tmp_path, argument, told):
    message = refusal(tmp_path, yaml.safe_dump(GIVEN), argument)
    assert re.search(told, message), message


def test_an_argument_changes_only_what_it_names(tmp_path):
    (tmp_path / "c.yaml").write_text("one: &a {x: y}\ntwo: *a\n")
    values, _ = read_config(tmp_path / "c.yaml")
    read_arguments(Config, ["one.z=w"], values)
    assert values == {"one": {"x": "y", "z": "w"}, "two": {"x": "y"}}


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w\w?)*!", "(a|a)*b", "(.*)*.*.*.*b"])
def test_a_regular_expression_that_would_go_on_for_ever_is_stopped(tmp_path, pattern):
    told = pytest.raises(UserError, match="grad_norm_groups: a regular expression takes longer than")
    with bounded(tmp_path), told, searching("grad_norm_groups", seconds=0.2):
        re.search(pattern, "a" * 60 + "." * 60)


def test_a_search_that_ends_leaves_no_clock_behind(tmp_path):
    with searching("grad_norm_groups", seconds=0.1):
        assert re.search("a+", "baa")
    until = os.times().user + 0.2
    while os.times().user < until:
        pass


def test_divisors_are_found_at_once():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert all(divisors(n) == [d for d in range(1, n + 1) if n % d == 0] for n in range(1, 200))


# ------------------------------------------------------------------ any value for any key of any script

ODD_TEXT = [
    "", " ", "~", "~nobody/x", "..", "/", "/dev/zero", "/dev/full", "s3://", "https://h/x", "file:///x", "null", "*",
    "1e400", "[a]", "{a,b}", "{0..5}", "lambda x: x", "16:9", "0x0", "-0", "%s%n", "a" * 5000, "\u202e",
    "\U0001f600" * 100,
]  # fmt: skip
ODD_NUMBERS = [
    0, -1, 1, 2, 2**31, 2**63 - 1, 2**63, -(2**63), 10**20, 10**400, 0.0, -0.0, 1e-320, 1e300, math.inf, -math.inf,
    math.nan, 0.5, True, False,
]  # fmt: skip
SIMPLE = st.one_of(
    st.none(),
    st.sampled_from(ODD_TEXT),
    st.sampled_from(ODD_NUMBERS),
    st.text("ab01.:-_[]{},*&!\"'#\\\0\n\u00e9\ud800", max_size=12),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.sampled_from([[1] * 3000, ["a"] * 3000, [{"path": "a.tar"}] * 3000, [["a", "lambda a: a"]] * 3000]),
)
KEYS = st.sampled_from(["path", "weight", "pattern", "a", "", 1, 0.5, None, True, "a" * 5000])
VALUES = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=6,
)


NETWORKS = {
    "families.cosmos": "transformer", "families.dit.pixart": "pixart", "families.dit": "dit.safetensors",
    "families.open_sora": "stdit3.safetensors", 
    "families.nova.class_to_image": "nova_classes.safetensors", "families.nova": "nova.safetensors",
}  # fmt: skip
"""What `folder` holds of networks, by where a config is."""


def needed(kind: type[Settings], folder) -> dict:
    """Values of the keys that a kind wants."""
    training = GIVEN | {"module_filters": [".attn"], "rank": 2, "words": ["a"]}
    training |= {"controlnet_blocks": [0], "controlnet_filter": "CannyFilter", "num_frames": 17}
    drawing = {"prompts": ["a"], "classes": ["1"], "pictures": ["a.png"], "stage_a_only": True, "device": "cpu"}
    is_library = kind.model_fields.keys() & {"autoencoder_checkpoint_path", "text_chunks"}
    of_family = next((file for module, file in NETWORKS.items() if kind.__module__.startswith(module)), None)
    network = of_family or ("unet" if is_library else "c")
    weights = {key: str(folder / network)
               for key in ("generator_checkpoint_path", "autoencoder_checkpoint_path")}  # fmt: skip
    further = (training if issubclass(kind, Config) else drawing) | weights
    return {key: value for key, value in further.items() if key in kind.model_fields.keys() - kind.unused}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, network, numbers in (
        ("unet", "UNet2DConditionModel", {}),
        ("transformer", "CosmosTransformer3DModel", cosmos.VERSIONS["mini"].transformer),
        ("pixart", "PixArtTransformer2DModel", pixart_versions.VERSIONS["mini"].network),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": network, **numbers}))
    mini = dit_versions.VERSIONS["mini"].network
    tensors = DiT(**mini | {"hidden_size": 8, "num_heads": 1, "depth": 1, "input_size": 8}).state_dict()
    save_file(tensors, tmp_path / "dit.safetensors", {CONFIG_KEY: json.dumps(mini)})
    small = STDiT3(hidden_size=8, num_heads=2, depth=1, caption_channels=8, model_max_length=4)
    save_file(small.state_dict(), tmp_path / "stdit3.safetensors")
    mini = nova_versions.VERSIONS["mini"].network
    for file, numbers in (("nova", mini), ("nova_classes", nova_versions.of_classes(mini, 5))):
        small = NOVATransformer(**numbers | {"arch": [{"depth": 1, "embed_dim": 8, "num_heads": 2}] * 3})
        save_file(small.state_dict(), tmp_path / f"{file}.safetensors", {CONFIG_KEY: json.dumps(numbers)})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use(config: Settings) -> None:
    """What the start of a run, or of a tool, does with any config."""
    dumped = yaml.safe_load(dump_config(config))
    changed_keys(config)
    if isinstance(config, Config):
        assert make_config(type(config), dumped) == config
        split_batch(config, 2, None)
        Buckets.for_image_size(config.image_size, config.multi_aspect_ratio, 32, config.bucketeer_random_ratio)


def used(folder, make: Callable[[], Settings]) -> str:
    """The message that a config, or its use, ends with; empty where it is taken."""
    with bounded(folder):
        try:
            use(make())
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, [[1] * 30_000]) for key in ("caches", "validation_caches", "train_tokens", "webdataset_path")),
        *((key, [""]) for key in ("caches", "validation_caches")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_list_of_what_a_key_cannot_hold_is_told_by_its_name(tmp_path, key, value):
    kind = KINDS["train/train_sd_lora.py SdLoraConfig"]
    told = used(tmp_path, lambda: make_config(kind, needed(kind, tmp_path) | {key: value}))
    assert key in told
    assert len(told) < LONGEST_MESSAGE


@pytest.mark.parametrize("name", KINDS)
@fuzz(40)
@given(data=st.data())
def test_any_value_of_any_key_is_taken_or_refused_by_name(name, folder, data):
    kind = KINDS[name]
    keys = data.draw(st.lists(st.sampled_from(sorted(kind.model_fields)), min_size=1, max_size=2, unique=True))
    changes = {key: data.draw(VALUES) for key in keys}
    told = used(folder, lambda: make_config(kind, needed(kind, folder) | changes))
    assert len(told) < LONGEST_MESSAGE
    assert not told or any(key in told for key in changes), (told, changes)


@fuzz(150)
@given(content=st.binary(max_size=60) | st.text("abc:[]{},&*!-? \n#|>'\"%@`0.<=~", max_size=60).map(str.encode))
def test_any_bytes_are_a_config_or_are_refused(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with bounded(tmp_path), pytest.raises(UserError) as error:
        load_config(Config, [str(path)])
    assert "config.yaml" in str(error.value) or "this key is required" in str(error.value)


@fuzz(150)
@given(key=st.sampled_from(sorted(Config.model_fields)), dotted=st.sampled_from(["", "", ".a", ".a.b"]),
       text=st.text("ab01.:-_[]{},*&!\"'# \n\u00e9", max_size=20) | st.sampled_from(ODD_TEXT))  # fmt: skip
def test_any_text_of_an_argument_is_taken_or_refused_by_name(folder, key, dotted, text):
    arguments = [f"{name}={value}" for name, value in GIVEN.items() if name != key]
    told = used(folder, lambda: load_config(Config, [*arguments, f"{key}{dotted}={text}"]))
    assert len(told) < LONGEST_MESSAGE
    assert not told or key in told, told
