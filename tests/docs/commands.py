"""Shell commands that the pages show, checked without being run: scripts, options, configs and keys exist."""

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from pydantic import ValidationError
from torch.distributed.run import get_args_parser as torchrun_parser

from families.registry import families
from tests.docs.pages import ROOT
from tools.config_reference import scripts, settings_of
from warpcore.arguments import read_arguments
from warpcore.config import Config, ConfigError, Settings, load_config
from warpcore.config_files import read_config

OTHER_PROGRAMS = {"git", "cd", "source", "pip", "aws", "tar"}
PLACEHOLDERS = {"FORMAT": "lora", "%a": "0"}
REQUIRED = {
    "experiment_id": "a",
    "checkpoint_path": "runs",
    "updates": 1,
    "batch_size": 256,
    "webdataset_path": "data",
    "module_filters": [".attn"],
    "rank": 4,
    "controlnet_blocks": [0],
    "controlnet_filter": "CannyFilter",
    "words": ["a"],
}
"""Values of the keys that some training scripts require."""


class Parsed(Exception):
    """Ends a tool once it has read its arguments."""

    def __init__(self, given: argparse.Namespace, rest: list[str]):
        self.given, self.rest = given, rest


def commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        inner = re.fullmatch(r"\w+=\$\((.*)\)", line.strip())
        for part in (inner.group(1) if inner else line).split("&&"):
            words = shlex.split(part, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


def check(words: list[str], folder: Path) -> None:
    """Fail where a command could not start. Configs that stand for the reader's own are written into `folder`."""
    program, *arguments = words
    if program == "make":
        targets = set(re.findall(r"^([\w/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert {word for word in arguments if "=" not in word} <= targets, words
    elif program in ("python3", "python"):
        check_script(arguments[0], arguments[1:], folder)
    elif program == "srun":
        check(arguments[next(place for place, word in enumerate(arguments) if not word.startswith("-")) :], folder)
    elif program == "torchrun":
        given = torchrun_parser().parse_args(arguments)
        check_script(given.training_script, given.training_script_args, folder)
    elif program == "sbatch":
        first = next(place for place, word in enumerate(arguments) if not word.startswith("-"))
        assert arguments[first] == "example_train.sh", words
        assert (ROOT / arguments[first]).is_file()
        check_script(arguments[first + 1], arguments[first + 2 :], folder)
    else:
        assert program in OTHER_PROGRAMS, f"{program}: an unknown program in {words}"


def check_script(script: str, arguments: list[str], folder: Path) -> None:
    assert (ROOT / script).is_file(), f"{script} does not exist"
    if "..." in arguments:
        return
    for placeholder, value in PLACEHOLDERS.items():
        arguments = [argument.replace(placeholder, value) for argument in arguments]
    if script in scripts():
        check_config(script, arguments, folder)
        return
    given = parse(script, arguments)
    keys = [*getattr(given.given, "settings", []), *given.rest]
    if hasattr(given.given, "script") and hasattr(given.given, "config"):
        check_config(str(given.given.script), [str(given.given.config), *keys], folder)
    elif hasattr(given.given, "format"):
        check_export(script, given.given)


def check_config(script: str, arguments: list[str], folder: Path) -> None:
    """A config file, if one is named, and keys after it, against the script's config class."""
    kind, *others = settings_of(script)
    if arguments and re.fullmatch(r"[A-Z_]+\.yaml", arguments[0]):
        arguments = [str(own_config(kind, folder)), *arguments[1:]]
    if issubclass(kind, Config):
        load_config(kind, arguments)
        return
    mistakes = [mistakes_of(one, arguments) for one in (kind, *others)]
    assert [] in mistakes, (script, mistakes)  # for one of the families that have the task, there are none


def mistakes_of(kind: type[Settings], arguments: list[str]) -> list:
    """Keys that are unknown and values that are wrong; files need not be there."""
    values: dict = {}
    if arguments and "=" not in arguments[0]:
        values, arguments = read_config(Path(arguments[0]))[0], arguments[1:]
    try:
        read_arguments(kind, arguments, values)
        unknown = values.keys() - kind.model_fields.keys()
        if not unknown:
            kind.model_validate(values)
        return sorted(unknown)
    except ConfigError as error:
        return [str(error)]
    except ValidationError as error:
        return [mistake for mistake in error.errors() if mistake["loc"] and mistake["type"] != "value_error"]


def own_config(kind: type[Settings], folder: Path) -> Path:
    """A config of the reader's, with the keys that are required."""
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in REQUIRED.items() if key in kind.model_fields}))
    return path


def check_export(script: str, given: argparse.Namespace) -> None:
    """Keys behind a format have to be those that one of the families with this format takes there."""
    forms = [form for family in families() for form in family.formats if form.name == given.format]
    mistakes = [mistakes_of(form.keys(), given.arguments) if form.keys else given.arguments for form in forms]
    assert [] in mistakes, f"{script} {given.format}: {mistakes}"


def parse(script: str, arguments: list[str]) -> Parsed:
    """What a tool reads from its arguments, by its own parser; the tool then ends."""
    module = load_module(ROOT / script)
    with pytest.MonkeyPatch.context() as patch, stop_after_parsing(patch):
        patch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(Parsed) as found:
            module.main()
    return found.value


@contextmanager
def stop_after_parsing(patch: pytest.MonkeyPatch) -> Iterator[None]:
    depth = 0

    def stopping(name: str):
        parse_as_usual = getattr(argparse.ArgumentParser, name)

        def parse(self, *args, **kwargs):
            nonlocal depth
            depth += 1
            try:
                result = parse_as_usual(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth:
                return result
            given, rest = result if isinstance(result, tuple) else (result, [])
            raise Parsed(given, rest)

        patch.setattr(argparse.ArgumentParser, name, parse)

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        stopping(name)
    yield


def load_module(path: Path) -> ModuleType:
    name = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
    spec = importlib.util.spec_from_file_location(f"shown_in_docs.{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
