"""Wrong arguments of tools, for `test_wrong_arguments`: by tool and kind the arguments, and what the message says."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN_C = str(ROOT / "train/train_c.py")
NO_FLAG = [("{} --colour red", "unrecognized arguments: --colour red")]
"""Of the positional arguments that a command takes."""
FOLDER_FOR_CONFIG = "config file folder is a folder"
UNKNOWN_KEY = "batch_sise: unknown key.*; did you mean batch_size"


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


OF_TOOLS: dict[str, dict[str, list[tuple[str, str]]]] = {
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
    "tools/average.py": {
        "no argument": [("", "the following arguments are required: run, target")],
        "unknown flag": [("folder new --colour red", "colour: unknown key")],
        "missing": [("missing new sigma_rel=0.1", "missing/config.yaml does not exist: name the folder of"),
                    ("sigma_rel=0.1 ./lr=1 new", "lr=1/config.yaml does not exist")],
        "file for a folder": [("text new sigma_rel=0.1", "text/config.yaml does not exist")],
        "output exists": [("folder taken.yaml sigma_rel=0.1", "taken.yaml is there already: name another folder")],
        "output in a file": [("folder text/new sigma_rel=0.1", "text is a file; name another folder")],
        "no number": [("folder new sigma_rel=ten", "sigma_rel: found 'ten'"),
                      ("folder new sigma_rel=0.5", "sigma_rel: .*0.28")],
        "unknown key": [("folder new sigma=0.1", "sigma: unknown key")],
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
    "tools/inspect_dataset.py": {
        "no argument": [("", "the following arguments are required: DATA")],
        "unknown flag": [("folder new.html --colour red", "unrecognized arguments: --colour red")],
        "missing": [
            ("folder", "name the data, or a training script and its config, and behind them the page to write"),
            ("missing new.html", "webdataset_path: no such tar: .*missing"),
            ("missing.py config.yaml new.html", "missing.py does not exist: the training script comes first"),
            (f"{TRAIN_C} missing.yaml new.html", "config file missing.yaml does not exist"),
            (f"{TRAIN_C} new.html", "behind .*train_c.py comes one config, found none"),
            ("folder s3://bucket/new.html", "s3://bucket/new.html is a URL, but a path of this machine is needed"),
            ("https://host/a.py config.yaml new.html", "https://host/a.py is a URL"),
        ],
        "folder for a file": [
            (f"{TRAIN_C} folder new.html", FOLDER_FOR_CONFIG), ("folder folder", "folder is no name of a page")],
        "file for a folder": [("config.yaml new.html", "config.yaml is a config: name its training script before it")],
        "empty": [("folder new.html", "folder holds no .tar")],
        "output exists": [("folder taken.html", "taken.html is there already: name another page")],
        "output in a file": [("folder text/new.html", "text/new.html can't be written: text is a file")],
        "no number": [("folder new.html --pictures ten", "expected a number above 0.*found 'ten'")],
        "unknown key": [(f"{TRAIN_C} unknown.yaml new.html", UNKNOWN_KEY)],
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
    "tools/runs.py": {
        "no argument": [("", "runs is not a folder of runs")],
        "unknown flag": [("folder --colour red", "unrecognized arguments: --colour red")],
        "missing": [
            ("missing", "missing is not a folder of runs"), ("https://host/runs", "https://host/runs is a URL, but")],
        "file for a folder": [("text", "text is not a folder of runs")],
        "empty": [("folder --export new", "folder holds no run .*: name a folder of runs")],
        "output exists": [("folder --export taken", "taken is not empty: name a new folder behind --export, or")],
        "output in a file": [("folder --export text/new", "text is a file; name a folder to write the page to")],
        "no number": [("folder --port ten", "expected a number above 0, up to 65535, found 'ten'")],
    },
    "tools/search_batch_size.py": {
        "no argument": [("", "the following arguments are required: script, config, tuned")],
        "unknown flag": [(f"{TRAIN_C} config.yaml new.yaml --colour red", "colour: unknown key")],
        **with_output(OF_SCRIPT_AND_CONFIG, "new.yaml"),
        "output exists": [(f"{TRAIN_C} config.yaml taken.yaml", "taken.yaml is there already: give the name of")],
        "output in a file": [(f"{TRAIN_C} config.yaml text/new.yaml", "can't be written: text is a file")],
        "no number": [(f"{TRAIN_C} config.yaml new.yaml --max-memory ten", "expected a number above 0, found 'ten'")],
    },
}  # fmt: skip
