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
from tests.wrong_arguments import FOLDER_FOR_CONFIG, OF_TOOLS, ROOT, UNKNOWN_KEY
from warpcore.data.sidecars import CACHE_VARIABLE

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
    **OF_TOOLS,
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
        "text": "some text\n", "taken/grid.png": "", "taken.yaml": "", "taken.safetensors": "", "taken.html": "",
        "empty.txt": "",
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
