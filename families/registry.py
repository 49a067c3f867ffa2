"""Finds the family of a run, a weights file or a model folder, and of the arguments of a script.

A family is a folder in one of `PACKAGES` with a `family.py`, which may hold several; there is no list of them. A
`family.py` is imported when somebody asks, what it needs for its networks only when they are built.
"""

import importlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from families.common.converted import ConvertedConfig
from families.common.family import SCRIPTS, ExportFormat, Family
from families.common.weight_files import FAMILY_KEY, RUN_CONFIG, exported_file, is_run, read_header
from families.common.weight_source import local_weights
from warpcore.arguments import pairs
from warpcore.config import Settings, load_config
from warpcore.config_files import read_config, read_mapping
from warpcore.data.storage import local_path
from warpcore.errors import UserError
from warpcore.keys import choices_of, describe, help_text
from warpcore.mistakes import keys_meant
from warpcore.safe_json import read_json
from warpcore.safe_yaml import parse_yaml

PACKAGES = ["families"]
"""Packages whose sub-packages with a `family.py` are families."""
INDEXES = ("model_index.json", "config.json")
"""Files of a model folder that say what it holds."""
LORA_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""The LoRA of a folder that peft or diffusers wrote."""


def families() -> list[Family]:
    """All families, by name."""
    found = []
    for package in PACKAGES:
        for place in importlib.import_module(package).__path__:
            names = sorted(path.parent.name for path in Path(place).glob("*/family.py"))
            found += [importlib.import_module(f"{package}.{name}.family") for name in names]
    return [family for module in found for family in _held(module)]


def _held(module: ModuleType) -> Sequence[Family]:
    """The families of a `family.py`."""
    return getattr(module, "FAMILIES", (module.FAMILY,) if hasattr(module, "FAMILY") else ())


def family_called(name: str | None) -> Family:
    """The family of a name. Raises UserError where there is none."""
    known = {family.name: family for family in families()}
    if name not in known:
        raise UserError(f"this training is of none of the families that are known here ({_titles(known.values())})")
    return known[name]


def family_of(path: Path) -> Family:
    """The family of a run's folder, a weights file, or a model folder; only headers are read.

    Raises:
        UserError: it is none of these, or of a family that nobody knows.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist")
    owners = [family for family in families() if _owns(family, path)]
    if len(owners) > 1 and is_run(path) and not any(path.glob("*.safetensors")):
        raise UserError(f"{path} is a run that has exported no weights yet: start it again, or name another one")
    if not owners:
        raise UserError(f"{path} is {_what(path)} of no family that is known here ({_titles(families())})")
    if len(owners) > 1:
        raise UserError(f"{path} could be of several families: {_titles(owners)}")
    return owners[0]


def _owns(family: Family, path: Path) -> bool:
    if path.is_file():
        return _has_weights(family, path)
    if is_run(path):
        config = read_mapping(path / RUN_CONFIG)
        if named := _named_in(path):
            return family.name in named
        files = {name: exported_file(path, name) for name in family.weight_keys}
        weights = {name: read_header(file) for name, file in files.items() if file is not None}
        return family.has_run(config, weights)
    if loras := [path / name for name in LORA_FILES if (path / name).is_file()]:
        return _has_weights(family, loras[0])
    return family.has_folder(path) or any(family.has_model_folder(index) for index in _indexes(path))


def _named_in(run: Path) -> set[str]:
    """The families that the exported weights of a run say they are of."""
    return {header.metadata[FAMILY_KEY] for header in map(read_header, sorted(run.glob("*.safetensors")))
            if FAMILY_KEY in header.metadata}  # fmt: skip


def _has_weights(family: Family, file: Path) -> bool:
    header = read_header(file)
    named = header.metadata.get(FAMILY_KEY)
    return named == family.name if named else family.has_weights(header)


def _indexes(folder: Path) -> list[dict[str, Any]]:
    """What a folder says that it holds; where it says nothing, what those directly inside say of themselves."""
    for pattern in (*INDEXES, *(f"*/{name}" for name in INDEXES)):
        read = [_json(file) for file in sorted(folder.glob(pattern))]
        if found := [index for index in read if isinstance(index, dict)]:
            return found
    return []


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None


def _what(path: Path) -> str:
    if path.is_file():
        return "a file"
    return "a training run" if is_run(path) else f"a folder without {RUN_CONFIG}, {INDEXES[0]}"


def _titles(of: Collection[Family]) -> str:
    return ", ".join(family.title for family in of)


# ------------------------------------------------------------------ inference scripts


def load_task(task: str, arguments: Sequence[str]) -> tuple[type, Settings]:
    """The class that does a task for the family that a script's arguments are about, and its config.

    The family follows from the runs, weights files and model folders that the arguments name; where they name none,
    from the keys. `--help` without any of them lists the keys of all families.

    Raises:
        UserError: no family, or several, can be meant.
    """
    able = [family for family in families() if family.task(task) is not None]
    wants_help = bool({"-h", "--help"} & {*arguments})
    meant = able
    if len(able) > 1:
        values = _values([one for one in arguments if one not in ("-h", "--help")])
        meant = _owners(able, task, values) or _having(able, task, values)
        if len(meant) > 1 and not wants_help:
            meant = _owners(able, task, values, download=True) or meant
    if len(meant) == 1:
        return meant[0].task(task), load_config(meant[0].config_of(task), list(arguments))
    if wants_help:
        print(_help(meant or able, task))
        raise SystemExit(0)
    raise UserError(_undecided(able, task, values))


def _named(able: Sequence[Family], values: Mapping[str, Any]) -> dict[Path, str]:
    """The runs and weights that arguments name, each with its key."""
    keys = ("run", *dict.fromkeys(key for family in able for key in family.weight_keys.values()))
    return {Path(str(one)): key for key in keys if key in values for one in _listed(values[key]) if one is not None}


def _owners(able: Sequence[Family], task: str, values: Mapping[str, Any], download: bool = False) -> list[Family]:
    """The families of the runs and weights that arguments name; none where nothing is there.

    download: fetch what is only on the hub, so that it says what it is.

    Raises:
        UserError: what they name is of a family that does not do the task, or of several.
    """
    named = _named(able, values)
    if download:
        shared = _shared_keys(able)
        named = {local_weights(path, key) if key in shared else path: key for path, key in named.items()}
    owners, unknown = {}, []
    for path, key in named.items():
        if key == "run" and path.exists() and not is_run(path):
            raise UserError(f"run: {path} is no training run: it holds no {RUN_CONFIG}")
        if path.exists():
            try:
                owners[path] = family_of(path)
            except UserError as error:
                unknown.append(error)
    if unknown and not owners and len(_having(able, task, values)) != 1:
        raise unknown[0]  # where the family is known otherwise, it says itself what is wrong with the file
    for path, owner in owners.items():
        if owner not in able:
            does = " and ".join(script for other, script in SCRIPTS.items() if owner.task(other) is not None)
            raise UserError(f"{path} is of {owner.title}, which does not do this: {task}. It has {does}")
    if len({owner.name for owner in owners.values()}) > 1:
        said = ", ".join(f"{path} is of {owner.title}" for path, owner in owners.items())
        raise UserError(f"these are weights of several families: {said}; name those of one")
    return [family for family in able if family in owners.values()]


def _shared_keys(able: Sequence[Family]) -> set[str]:
    """The keys that take weights of any of the families."""
    return set.intersection(*({*family.weight_keys.values()} for family in able))


def _having(able: Sequence[Family], task: str, values: Mapping[str, Any]) -> list[Family]:
    """The families that have all these keys, with the values that are given where there is a choice."""
    return [family for family in able if all(_takes(family.config_of(task), *given) for given in values.items())]


def _takes(kind: type[Settings], key: str, value: Any) -> bool:
    choices = choices_of(kind, key)
    return key in kind.model_fields and (not choices or not isinstance(value, str) or value in choices)


def _undecided(able: Sequence[Family], task: str, values: Mapping[str, Any]) -> str:
    """Why no single family can be meant, and what to write instead."""
    all_keys = {key for family in able for key in family.config_of(task).model_fields}
    for key in values:
        if key not in all_keys:
            near = keys_meant(key, all_keys, 3)
            return f"no family has the key {key}" + (f"; did you mean {' or '.join(near)}?" if near else "")
    shared = _shared_keys(able)
    there = [f"{key}: {path} does not exist" for path, key in _named(able, values).items()
             if key in {"run", *shared} and not path.exists()]  # fmt: skip
    hint = " or ".join(
        ["name a run (run=FOLDER)", *(f"{key}=FILE, FOLDER or OWNER/NAME of the hub" for key in shared)]
    )
    if not _having(able, task, values):
        of_each = [
            f"{family.title} has no {key if key not in family.config_of(task).model_fields else f'{key} {value}'}"
            for family in able
            for key, value in values.items()
            if not _takes(family.config_of(task), key, value)
        ]
        return f"no family takes all of these keys: {'; '.join(of_each)}"
    return "; ".join([*(there or [f"these keys do not tell which family is meant ({_titles(able)})"]), hint])


def _help(of: Sequence[Family], task: str) -> str:
    """The keys that all of the families have, then those of each."""
    kinds = [family.config_of(task) for family in of]
    common = {row[0] for row in set.intersection(*(set(describe(kind)) for kind in kinds))}
    parts = [f"The family follows from the run or the weights that are named: {_titles(of)}."]
    parts.append(f"KEYS OF EVERY FAMILY\n{help_text(kinds[0], common)}")
    parts += [f"KEYS OF {family.title.upper()} \n{help_text(kind, kind.model_fields.keys() - common)}"
              for family, kind in zip(of, kinds, strict=True)]  # fmt: skip
    return "\n\n".join(parts)


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    """What a config file and the arguments behind it say, not yet typed by a family's keys."""
    arguments, values = list(arguments), {}
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("--"):
        values, _ = read_config(local_path(arguments.pop(0)))
    for key, text in pairs(arguments):
        values[key] = parse_yaml(text, key) if text.startswith("[") else text
    return values


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


# ------------------------------------------------------------------ configs of other programs


def converted_config(path: Path, config: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> ConvertedConfig:
    """What the training configuration of another program in a file becomes; see `Family.converted_config`.

    Raises:
        UserError: no family knows such a configuration, or it is wrong.
    """
    for family in families():
        try:
            if (made := family.converted_config(config, deepspeed)) is not None:
                return made
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    raise UserError(f"{path} is the configuration of no program that a family knows here ({_titles(families())})")


# ------------------------------------------------------------------ exports


def export_formats() -> dict[str, list[tuple[Family, ExportFormat]]]:
    """The formats of all families, by name, each with the families that have it."""
    found: dict[str, list[tuple[Family, ExportFormat]]] = {}
    for family in families():
        for form in family.formats:
            found.setdefault(form.name, []).append((family, form))
    return found


def export_format(name: str, source: Path) -> ExportFormat:
    """The format of the family whose run, file or folder `source` is.

    Raises:
        UserError: several families have a format of this name, and the source is of none of them.
    """
    having = export_formats()[name]
    if len(having) == 1:
        return having[0][1]
    owner = family_of(source)
    found = [form for family, form in having if family.name == owner.name]
    if not found:
        own = "".join(f"\n  {form.name}: {form.target}" for form in owner.formats)
        raise UserError(f"{source} is of {owner.title}, which has no format {name}; it has:{own}")
    return found[0]
