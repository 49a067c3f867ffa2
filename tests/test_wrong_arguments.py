"""Every command says in one line what is wrong with its arguments, ends with status 2, and writes nothing."""

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modules.dit import DiT
from tests.families.open_sora.tiny import write_mini
from tests.warpcore.data.tars import picture
from warpcore.data.sidecars import CACHE_VARIABLE

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "inference", "models", "train")
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)
KINDS = (
    "no argument", "unknown flag", "missing", "folder for a file", "file for a folder", "empty", "output exists",
    "output in a file", "no number", "unknown key",
)  # fmt: skip
TRAIN_C = str(ROOT / "train/train_c.py")
NO_FLAG = [("{} --colour red", "unrecognized arguments: --colour red")]
"""Of the positional arguments that a command takes."""
FOLDER_FOR_CONFIG = "config file folder is a folder"
UNKNOWN_KEY = "batch_sise: unknown key.*; did you mean batch_size"

SCRIPT = {
    "no argument": [("", "webdataset_path: this key is required")],
    "unknown flag": [("config.yaml --colour red", "colour: unknown key"), ("config.yaml --colour", "write key=value")],
    "missing": [
        ("missing.yaml", "config file missing.yaml does not exist"),
        ("config.yaml base=missing.yaml", "base: only a config file may start from others"),
    ],
    "folder for a file": [("folder", FOLDER_FOR_CONFIG)],
    "empty": [("empty.yaml", "webdataset_path: this key is required")],
    "no number": [("config.yaml lr=ten", "lr: found 'ten'"), ("config.yaml batch_size=0", "batch_size: found 0")],
    "unknown key": [("unknown.yaml", f"{UNKNOWN_KEY}"), ("config.yaml batch_sise=1", UNKNOWN_KEY)],
}
"""Of every training script."""
OF_SCRIPT_AND_CONFIG = {
    "missing": [
        ("missing.py config.yaml", "missing.py does not exist: the training script comes first, then its config"),
        (f"{TRAIN_C} missing.yaml", "config file missing.yaml does not exist"),
    ],
    "folder for a file": [
        ("folder config.yaml", "folder is a folder: the training script comes first"),
        (f"{TRAIN_C} folder", FOLDER_FOR_CONFIG),
    ],
    "file for a folder": [
        (f"text {TRAIN_C}", "text is no Python script: the training script comes first, then its config"),
        (f"config.yaml {TRAIN_C}", "config.yaml is no Python script"),
    ],
    "empty": [
        ("empty.py config.yaml", "empty.py defines no use case"),
        (f"{TRAIN_C} empty.yaml", "webdataset_path: this key is required"),
    ],
    "unknown key": [(f"{TRAIN_C} unknown.yaml", UNKNOWN_KEY)],
}
"""Of the tools that take a training script and its config."""


def with_output(cases: dict, output: str) -> dict:
    """The same with the argument that names what is written behind the others."""
    return {kind: [(f"{given} {output}", told) for given, told in rows] for kind, rows in cases.items()}


CASES: dict[str, dict[str, list[tuple[str, str]]]] = {
    "inference/reconstruct.py": {
        "no argument": [("", "these keys do not tell which family is meant")],
        "unknown flag": [("--colour red", "no family has the key colour"), ("--colour", "write key=value")],
        "missing": [
            ("missing.yaml", "config file missing.yaml does not exist"),
            ("--run missing --pictures pictures", "run: missing does not exist"),
            ("rebuild.yaml pictures=missing", "pictures: missing is no file and no folder with some to read"),
            ("rebuild.yaml stage_a_checkpoint_path=missing.safetensors pictures=pictures", "missing.safetensors"),
        ],
        "folder for a file": [("folder", FOLDER_FOR_CONFIG)],
        "file for a folder": [("--run text --pictures pictures", "run: text is no training run")],
        "empty": [
            ("empty.yaml", "these keys do not tell which family is meant"),
            ("rebuild.yaml pictures=folder", "pictures: folder is no file and no folder with some to read"),
            ("rebuild.yaml pictures=empty.jpg", "pictures: there is none to rebuild: empty.jpg"),
        ],
        "output exists": [("rebuild.yaml output_path=taken", "taken/grid.png is there already: give another output")],
        "output in a file": [("rebuild.yaml output_path=text/new", "can't be written: text is a file")],
        "no number": [("rebuild.yaml most_pictures=ten", "most_pictures: found 'ten'")],
        "unknown key": [("unknown.yaml", "no family has the key batch_sise; did you mean batch_size")],
    },
    "inference/class_to_image.py": {
        "no argument": [("", "these keys do not tell which family is meant")],
        "unknown flag": [("--colour red", "no family has the key colour"), ("--colour", "write key=value")],
        "missing": [
            ("missing.yaml", "config file missing.yaml does not exist"),
            ("--run missing --classes [1]", "run: missing"),
            ("classes.yaml class_file=missing.txt", "class_file: missing.txt does not exist"),
            ("classes.yaml generator_checkpoint_path=missing.safetensors", "missing.safetensors"),
            ("--classes [1]", "these keys do not tell which family is meant"),
        ],
        "folder for a file": [
            ("folder", FOLDER_FOR_CONFIG),
            ("classes.yaml class_file=folder", "class_file: folder is a folder"),
        ],
        "file for a folder": [("--run text --classes [1]", "run: text is no training run")],
        "empty": [
            ("empty.yaml", "these keys do not tell which family is meant"),
            ("classes.yaml classes=[]", "nothing to draw: give classes or class_file"),
            ("classes.yaml class_file=empty.txt", "class_file: empty.txt holds no class; write one per line"),
            ("classes.yaml generator_checkpoint_path=empty.safetensors", "empty.safetensors cannot be read"),
        ],
        "output exists": [("classes.yaml output_path=taken", "taken/grid.png is there already: give another output")],
        "output in a file": [("classes.yaml output_path=text/new", "can't be written: text is a file")],
        "no number": [
            ("classes.yaml steps=ten", "steps: found 'ten'"),
            ("classes.yaml classes=[ten]", "classes, class_file: 'ten' is no class; classes are numbers from 0 to 4"),
            ("classes.yaml classes=[5]", r"class 5 is outside of 0 to 4 \(num_classes: 5\)"),
        ],
        "unknown key": [("unknown.yaml", "no family has the key batch_sise; did you mean batch_size")],
    },
    "inference/text_to_image.py": {
        "no argument": [("", "these keys do not tell which family is meant")],
        "unknown flag": [("--colour red", "no family has the key colour"), ("--colour", "write key=value")],
        "missing": [
            ("missing.yaml", "config file missing.yaml does not exist"),
            ("--run missing --prompts x", "run: missing does not exist"),
            ("draw.yaml prompt_file=missing.txt", "prompt_file: missing.txt does not exist"),
            ("draw.yaml image=missing.jpg", "image: missing.jpg does not exist"),
            ("draw.yaml lora=missing.safetensors", "missing.safetensors"),
            ("draw.yaml controlnet=missing.safetensors control_image=pictures/0.jpg", "missing.safetensors"),
        ],
        "folder for a file": [
            ("folder", FOLDER_FOR_CONFIG),
            ("draw.yaml prompt_file=folder", "prompt_file: folder is a folder"),
            ("draw.yaml image=folder", "image: folder is a folder"),
        ],
        "file for a folder": [("--run text --prompts x", "run: text is no training run")],
        "empty": [
            ("empty.yaml", "these keys do not tell which family is meant"),
            ("draw.yaml prompt_file=empty.txt", "prompt_file: empty.txt holds no prompt; write one per line"),
            ("draw.yaml generator_checkpoint_path=empty.safetensors", "empty.safetensors cannot be read as weights"),
            ("draw.yaml image=empty.jpg", "empty.jpg"),
        ],
        "output exists": [("draw.yaml output_path=taken", "taken/grid.png is there already: give another output")],
        "output in a file": [("draw.yaml output_path=text/new", "can't be written: text is a file")],
        "no number": [("draw.yaml steps=ten", "steps: found 'ten'"), ("draw.yaml seeds=ten", "seeds: found ")],
        "unknown key": [("unknown.yaml", "no family has the key batch_sise; did you mean batch_size")],
    },
    "inference/text_to_video.py": {
        "no argument": [("", "nothing to draw: give prompts or prompt_file|these keys do not tell which family")],
        "unknown flag": [("video.yaml --colour red", "colour"), ("--colour", "write key=value")],
        "missing": [
            ("--run missing --prompts x", "run: missing"),
            ("video.yaml prompt_file=missing.txt", "prompt_file: missing.txt does not exist"),
            ("video.yaml reference_path=missing.png mask_strategy=0", "reference_path: missing.png does not exist"),
            ("video.yaml reference_path=http://127.0.0.1:9/a.png mask_strategy=0", "a.png cannot be fetched"),
        ],
        "folder for a file": [("video.yaml reference_path=folder mask_strategy=0", "folder is a folder")],
        "empty": [("video.yaml reference_path=empty.jpg mask_strategy=0", "empty.jpg is no video")],
        "output exists": [("video.yaml output_path=taken", "taken/grid.png is there already: give another output")],
        "no number": [("video.yaml mask_strategy=0,a", "mask_strategy '0,a': '0,a': reference is 'a'")],
    },
    "models/download.py": {
        "no argument": [("", "the following arguments are required: SET")],
        "unknown flag": [("essential --colour red", "unrecognized arguments: --colour")],
        "missing": [("mising", "'mising' is unknown; write any of sd15")],
        "output exists": [("essential --folder text", "text is a file; name a folder to write the files to")],
        "output in a file": [("essential --folder text/new", "text is a file; name a folder to write the files to")],
    },
    "tools/build_dataset.py": {
        "no argument": [("", "the following arguments are required: FOLDER, OUT")],
        "unknown flag": [("pictures new --colour red", "unrecognized arguments: --colour red")],
        "missing": [
            ("missing new", "missing is not a folder of pictures"),
            ("pictures new --metadata missing.csv", "--metadata missing.csv: it does not exist"),
            ("pictures new --import .a", "--import ENDING .* and --for SCRIPT CONFIG .* belong together"),
            ("pictures new --import .a --for missing.py config.yaml", "missing.py does not exist"),
        ],
        "folder for a file": [("pictures new --metadata folder", "--metadata folder: it is a folder")],
        "file for a folder": [("text new", "text is not a folder of pictures")],
        "empty": [
            ("folder new", "folder holds no usable picture"),
            ("empty new", "empty holds no usable picture or video: .*empty file: 0.jpg"),
            ("pictures new --metadata empty.jsonl", "--metadata empty.jsonl: it has no line"),
        ],
        "output exists": [("pictures taken", "taken is not empty; choose another folder, or give --overwrite")],
        "output in a file": [("pictures text/new", "text is a file; name a folder to write the tars to")],
        "no number": [
            ("pictures new --samples-per-shard ten", "expected a number above 0, up to 1000000000, found 'ten'"),
            ("pictures new --shard-size big", "expected a size such as 500MB or 2GB, found 'big'"),
            (f"pictures new --shard-size {'9' * 5000}", "expected a size such as 500MB or 2GB, found '999"),
        ],
    },
    "tools/cache.py": {
        "no argument": [("", "the following arguments are required: SCRIPT, CONFIG, OUT")],
        "unknown flag": [(f"{TRAIN_C} config.yaml new --colour red", "unrecognized arguments: --colour")],
        **with_output(OF_SCRIPT_AND_CONFIG, "new"),
        "output exists": [(f"{TRAIN_C} config.yaml taken", "taken is not empty and holds no cache")],
        "output in a file": [
            (f"{TRAIN_C} config.yaml text", "text is a file; name a folder to write the cache to"),
            (f"{TRAIN_C} config.yaml text/new", "text is a file; name a folder to write the cache to"),
        ],
        "no number": [(f"{TRAIN_C} config.yaml new --variants ten", "expected a number above 0.*found 'ten'")],
    },
    "tools/compare_runs.py": {
        "no argument": [("", "the following arguments are required: FOLDER, OUT")],
        "unknown flag": [("pictures pictures new --colour red", "unrecognized arguments: --colour red")],
        "missing": [
            ("pictures new", "name two folders or more, and behind them OUT"),
            ("pictures missing new", "missing is not a folder of pictures"),
        ],
        "file for a folder": [("pictures text new", "text is not a folder of pictures")],
        "empty": [("pictures folder new", "no picture has the same name in two of the folders")],
        "output exists": [("pictures pictures taken", "taken is not empty: name a new folder")],
        "output in a file": [("pictures pictures text/new", "text is a file; name a folder to write the page")],
        "no number": [("pictures pictures new --size ten", "expected a number above 0.*found 'ten'")],
    },
    "tools/config_reference.py": {
        "no argument": [("", "the following arguments are required: page")],
        "unknown flag": [("text --colour red", "unrecognized arguments: --colour red")],
        "missing": [("missing.md", "missing.md does not exist")],
        "folder for a file": [("folder", "folder is a folder")],
        "empty": [("empty.txt", "empty.txt has no place for the tables: write the two lines")],
        "output in a file": [("text/page.md", "text/page.md does not exist")],
    },
    "tools/convert_config.py": {
        "no argument": [("", "the following arguments are required: THEIRS, OURS")],
        "unknown flag": [("nova.yaml new.yaml --colour red", "colour: unknown key")],
        "missing": [("missing.yaml new.yaml", "config file missing.yaml does not exist"),
                    ("nova.yaml new.yaml --deepspeed missing.json", "missing.json does not exist")],
        "empty": [("empty.yaml new.yaml", "empty.yaml is the configuration of no program that a family knows here")],
        "output exists": [("nova.yaml taken.yaml", "taken.yaml is there already: name another file, or give --over")],
        "unknown key": [("nova.yaml new.yaml batch_sise=1", UNKNOWN_KEY)],
    },
    "tools/convert_weights.py": {
        "no argument": [("", "the following arguments are required: source, target")],
        "unknown flag": [("c.safetensors new.safetensors --colour red", "unrecognized arguments: --colour red")],
        "missing": [("missing.safetensors new.safetensors", "missing.safetensors does not exist")],
        "folder for a file": [
            ("folder new.safetensors", "folder is a folder"),
            ("c.safetensors folder --overwrite", "folder is there already: name another file, or give --overwrite")],
        "empty": [("empty.safetensors new.safetensors", "empty.safetensors is no whole safetensors file")],
        "output exists": [("c.safetensors taken.safetensors", "taken.safetensors is there already: name another")],
        "output in a file": [
            ("c.safetensors text/new.safetensors", "text is a file; name another file"),
            ("c.safetensors text/new.safetensors --overwrite", "text is a file; name another file")],
        "no number": [("c.safetensors new.safetensors --dtype float7", "invalid choice: 'float7'")],
    },
    "tools/export.py": {
        "no argument": [("", "the following arguments are required: format, source, target")],
        "unknown flag": [
            ("controlnet c.safetensors new.safetensors --colour red", "colour: unknown key"),
            ("from-diffusers folder new --colour red", "from-diffusers takes a source and a target, and no --colour"),
            ("painting c.safetensors new", "invalid choice: 'painting'"),
        ],
        "missing": [("diffusers missing new", "missing does not exist")],
        "folder for a file": [
            ("diffusers folder new", "folder is a folder without config.yaml, model_index.json of no family"),
            ("controlnet folder new.safetensors", "folder"),
            ("lora folder new.safetensors", "folder is a folder without config.yaml")],
        "file for a folder": [("from-diffusers text new", "text holds no pipeline of diffusers")],
        "empty": [
            ("diffusers empty.safetensors new", "empty.safetensors cannot be read as weights"),
            ("controlnet empty.safetensors new.safetensors", "empty.safetensors")],
        "output exists": [
            ("from-diffusers folder taken", "taken is not empty: name another folder"),
            ("controlnet c.safetensors taken.safetensors", "taken.safetensors is there already: name another file"),
        ],
        "output in a file": [
            ("from-diffusers folder text/new", "text is a file; name another file"),
            ("controlnet c.safetensors text/new.safetensors", "text is a file; name another file")],
        "no number": [("controlnet c.safetensors new.safetensors --controlnet_blocks ten", "controlnet_blocks:")],
        "unknown key": [("controlnet c.safetensors new.safetensors batch_sise=1", "batch_sise: unknown key")],
    },
    "tools/index_dataset.py": {
        "no argument": [("", "the following arguments are required: PATH")],
        "unknown flag": [("folder --colour red", "unrecognized arguments: --colour red")],
        "missing": [("missing", "missing"), ("missing.tar", "missing.tar")],
        "empty": [("folder", "folder")],
        "output in a file": [
            ("folder --cache text", "text is a file; name a folder to write the indexes to"),
            ("folder --cache text/new", "text is a file; name a folder to write the indexes to")],
        "no number": [("folder --workers ten", "expected a number above 0, up to 1024, found 'ten'")],
    },
    "tools/make_demo_dataset.py": {
        "no argument": [("", "the following arguments are required: folder")],
        "unknown flag": [("new --colour red", "unrecognized arguments: --colour red")],
        "file for a folder": [("text", "text is a file; name a folder to write the pictures to")],
        "output exists": [("taken", "taken is not empty and no demo data set; name a new folder")],
        "output in a file": [("text/new", "text is a file; name a folder to write the pictures to")],
        "no number": [
            ("new --num_pictures ten", "expected a number above 0.*found 'ten'"),
            ("new --video --num_videos ten", "expected a number above 0.*found 'ten'"),
            ("new --seed -1", "expected a whole number from 0, found '-1'"),
        ],
    },
    "tools/make_demo_subject.py": {
        "no argument": [("", "the following arguments are required: folder")],
        "unknown flag": [("new --colour red", "unrecognized arguments: --colour red")],
        "file for a folder": [("text", "text is a file; name a folder to write the pictures to")],
        "output exists": [("taken", "taken is not empty and no demo data set; name a new folder")],
        "output in a file": [("text/new", "text is a file; name a folder to write the pictures to")],
    },
    "tools/memory.py": {
        "no argument": [("", "the following arguments are required: script, config")],
        "unknown flag": [(f"{TRAIN_C} config.yaml --colour red", "colour: unknown key")],
        **OF_SCRIPT_AND_CONFIG,
        "no number": [
            (f"{TRAIN_C} config.yaml --gpu-memory ten", "expected a number above 0, found 'ten'"),
            (f"{TRAIN_C} config.yaml --processes 0", "expected a number above 0.*found '0'"),
        ],
    },
    "tools/search_batch_size.py": {
        "no argument": [("", "the following arguments are required: script, config, tuned")],
        "unknown flag": [(f"{TRAIN_C} config.yaml new.yaml --colour red", "colour: unknown key")],
        **with_output(OF_SCRIPT_AND_CONFIG, "new.yaml"),
        "output exists": [(f"{TRAIN_C} config.yaml taken.yaml", "taken.yaml is there already: give the name of")],
        "output in a file": [(f"{TRAIN_C} config.yaml text/new.yaml", "can't be written: text is a file")],
        "no number": [(f"{TRAIN_C} config.yaml new.yaml --max-memory ten", "expected a number above 0, found 'ten'")],
    },
    **{command: SCRIPT for command in COMMANDS if command.startswith("train/")},
}  # fmt: skip
"""By command and by kind: the arguments, and what the message says. A command has the kinds that it can have."""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> Path:
    """A folder of the files that arguments name: some that are right, and some of each wrong kind."""
    folder = tmp_path_factory.mktemp("arguments")
    config = {
        "experiment_id": "a", "checkpoint_path": "runs", "webdataset_path": "folder", "model_version": "mini",
        "batch_size": 1, "updates": 1, "image_size": 64, "lr": 0.001, "device": "cpu", "num_workers": 0,
    }  # fmt: skip
    draw = "model_version: mini\ngenerator_checkpoint_path: c.safetensors\nprompts: [x]\ndevice: cpu\n"
    texts = {
        "text": "some text\n", "taken/grid.png": "", "taken.yaml": "", "taken.safetensors": "", "empty.txt": "",
        "empty.py": "", "empty.yaml": "", "empty.jsonl": "", "empty.jpg": "", "empty.safetensors": "",
        "empty/0.jpg": "", "unknown.yaml": "batch_sise: 4\n", "draw.yaml": draw,
        "config.yaml": "".join(f"{key}: {value}\n" for key, value in config.items()),
        "nova.yaml": "PIPELINE: {TYPE: nova_train_t2i}\nTRAIN: {DATASET: folder}\n",
        "rebuild.yaml": "model_version: mini\nstage_a_only: true\npictures: [pictures]\ndevice: cpu\n",
    }  # fmt: skip
    texts["classes.yaml"] = draw.replace("c.safetensors", "d.safetensors").replace("prompts: [x]", "classes: [1]")
    texts["video.yaml"] = draw.replace("c.safe", "v.safe") + "num_frames: 17\n"
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("folder", "pictures", "home"):
        (folder / name).mkdir()
    (folder / "pictures/0.jpg").write_bytes(picture())
    save_file({"a": torch.zeros(1)}, folder / "c.safetensors", {"family": "cascade"})
    write_mini(folder / "v.safetensors")
    numbers = {"hidden_size": 128, "depth": 6, "patch_size": 1, "in_channels": 16, "num_classes": 5}
    tensors = DiT(**numbers | {"hidden_size": 8, "depth": 1, "num_heads": 1, "input_size": 8}).state_dict()
    save_file(tensors, folder / "d.safetensors", {"family": "dit", "config": json.dumps(numbers)})
    return folder


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_every_command_is_tested_here():
    assert sorted(CASES) == COMMANDS
    assert {kind for cases in CASES.values() for kind in cases} == set(KINDS)
    assert all({"no argument", "unknown flag"} <= cases.keys() for cases in CASES.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_arguments_are_explained_in_one_line_and_nothing_is_written(command, arguments, monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(arguments / "home"))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv(CACHE_VARIABLE, "")
    monkeypatch.chdir(arguments)
    # First under its own name: `inspect`, by which pydantic finds docstrings, keeps the name that a file had first.
    importlib.import_module(command.removesuffix(".py").replace("/", "."))
    before = contents(arguments)
    for kind, cases in CASES[command].items():
        for given, message in cases:
            case = f"{command} {given[:200]} ({kind})"
            monkeypatch.setattr(sys, "argv", [command, *given.split()])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / command), run_name="__main__")
            out, told = capsys.readouterr()
            assert ended.value.code == 2, case
            assert re.search(f"error: .*{message}", told, re.DOTALL), f"{case}: {told}"
            assert told.count("error: ") == 1, f"{case}: {told}"
            assert "Traceback" not in told, f"{case}: {told}"
            assert len(told) < 3000, f"{case}: {told}"
            assert out == "", f"{case}: {out}"
            assert contents(arguments) == before, case
