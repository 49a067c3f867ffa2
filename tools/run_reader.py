"""Runs as the run page shows them: what their files say, whoever wrote those files."""

import io
import json
import math
import re
import shlex
import threading
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeVar

from PIL import Image

from tools.compare_runs import numbered
from tools.run_metrics import SEEN, SPEED, TOO_LARGE, Metrics
from tools.run_places import CONFIG, SAMPLES, Files, Listing, RunPlace
from warpcore.config_files import MAX_FILE_BYTES
from warpcore.data.tars import clean
from warpcore.errors import UserError
from warpcore.notes import NOTES
from warpcore.pictures import cells_in
from warpcore.safe_json import parse_json
from warpcore.safe_yaml import parse_mapping
from warpcore.text import decode_text

T = TypeVar("T")
SHEET = re.compile(r"([0-9]{1,12})\.png")
MOST_NOTES, NOTES_BYTES = 2_000, 2**20
HEADER_BYTES, MOST_SHEET_BYTES = 2**18, 2**28
"""Of a sheet: what comes before its pixels, mostly; and the most that is read of one."""
TYPES = {".png": "image/png", ".mp4": "video/mp4"}
"""Files of samples that are shown."""


class Runs:
    """All runs below a place, by their numbers, which stay as they are while the page is open."""

    def __init__(self, place: RunPlace):
        self.place, self._listing = place, Listing(place)
        self._lock, self._runs = threading.Lock(), {}

    def all(self) -> list["Run"]:
        """Those that are there, by name. Raises UserError where the place can't be read."""
        files = self._listing.files()
        found = [name.removesuffix(CONFIG) for name in files if name == CONFIG or name.endswith(f"/{CONFIG}")]
        with self._lock:
            for name in found:
                if name not in self._runs:
                    self._runs[name] = Run(self.place, self._listing, name, len(self._runs))
            return [self._runs[name] for name in sorted(found)]

    def run(self, number: str) -> "Run":
        """Raises LookupError."""
        return _only(run for run in self.all() if str(run.number) == number)


class Run:
    """One run. prefix: of its files' names in the place, such as `NAME/`."""

    def __init__(self, place: RunPlace, listing: Listing, prefix: str, number: int):
        self.place, self.prefix, self.number = place, prefix, number
        self._listing = listing
        self.metrics = Metrics(
            lambda: self._size("metrics.jsonl"),
            lambda start, size: place.read(f"{prefix}metrics.jsonl", start, size),
            self._batch_size,
        )
        self._told: tuple[Any, list[dict]] = None, []
        self._settings: tuple[Any, dict, str] = None, {}, ""
        self._sheet = lru_cache(512)(self._read_sheet)

    @property
    def name(self) -> str:
        """As people read it: names of files need not be text."""
        return clean(self.prefix.rstrip("/") or self.place.name.rstrip("/").rpartition("/")[2] or self.place.name)

    def _files(self) -> Files:
        return self._listing.files()

    def _size(self, name: str) -> int:
        return self._files().get(self.prefix + name, (0, ""))[0]

    def _whole(self, name: str, most: int) -> bytes:
        return self.place.read(self.prefix + name, 0, min(self._size(name), most + 1))

    def summary(self) -> dict[str, Any]:
        """What the list of runs shows."""
        self.metrics.refresh()
        info, last, notes = self._info(), self.metrics.last, self.notes()
        update = _count(last.get("update"))
        update = _count(info.get("update")) or 0 if update is None else update
        updates = _count(info.get("updates")) or _count(self.settings()[0].get("updates"))
        state = self._state(update, updates, notes)
        speed = _number(last.get(SPEED))
        left = None
        if state == "running" and speed and updates and update:
            seen = _count(last.get(SEEN))
            samples = self._batch_size() if seen is None else seen / update
            left = _number(max(0, updates - update) * samples / speed)
        return {
            "id": self.number, "name": self.name, "state": state, "update": update, "updates": updates,
            "speed": speed, "left": left, "loss": _number(last.get("loss")), "bad": _count(info.get("bad_samples")),
            "metrics": [clean(name) for name in self.metrics.names],
            "samples": [one["update"] for one in self.samples()],
        }  # fmt: skip

    def _state(self, update: int, updates: int | None, notes: list[dict]) -> str:
        """running, finished, stopped (it can go on), failed, or killed (it ended without a word)."""
        if self.place.lives(self.prefix, self._files()):
            return "running"
        if updates is not None and update >= updates:
            return "finished"
        said = next((note["state"] for note in reversed(notes) if note.get("state")), "stopped")
        return "killed" if said == "running" else said if said in ("stopped", "failed") else "stopped"

    def details(self) -> dict[str, Any]:
        """Its configuration, notes, and how it goes on."""
        settings, problem = self.settings()
        notes = self.notes()
        started = next((note for note in reversed(notes) if note.get("command")), None)
        config = f"{self.place.command_path(self.prefix)}/{CONFIG}"
        return {
            "config": {clean(str(key)): _shown(value) for key, value in settings.items()},
            "problem": problem,
            "notes": notes,
            "command": _command(started) if started else None,
            "config_path": clean(shlex.quote(config)),
            "samples_elsewhere": _shown(settings["output_path"]) if settings.get("output_path") else None,
            "strange": self.metrics.strange,
        }

    def settings(self) -> tuple[dict[str, Any], str]:
        """The configuration, and what is wrong with it."""
        version = self._files().get(self.prefix + CONFIG)
        if self._settings[0] != version:
            try:
                content = self._whole(CONFIG, MAX_FILE_BYTES)
                if len(content) > MAX_FILE_BYTES:
                    raise UserError(f"{CONFIG} has more than {MAX_FILE_BYTES} bytes")
                self._settings = version, parse_mapping(decode_text(content, CONFIG), CONFIG), ""
            except UserError as error:
                self._settings = version, {}, str(error)
        return self._settings[1:]

    def _batch_size(self) -> float:
        return float(_count(self.settings()[0].get("batch_size")) or math.nan)

    def _info(self) -> dict[str, Any]:
        return _object(self._whole("info.json", 2**20))

    def notes(self) -> list[dict[str, Any]]:
        """The last ones; each has a text."""
        version = self._files().get(self.prefix + NOTES)
        if self._told[0] != version:
            size = self._size(NOTES)
            start = max(0, size - NOTES_BYTES)
            content = self.place.read(self.prefix + NOTES, start, size - start)
            lines = content[: content.rfind(b"\n") + 1].splitlines()[1 if start else 0 :][-MOST_NOTES:]
            self._told = version, [_note(line) for line in lines]
        return self._told[1]

    def samples(self) -> list[dict[str, Any]]:
        """The sheets, by update; `clip` where it moves, too."""
        files, prefix = self._files(), f"{self.prefix}{SAMPLES}/"
        found = []
        for name, (_, version) in files.items():
            sheet = SHEET.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
            if sheet:
                clip = f"{sheet[1]}.mp4" if f"{prefix}{sheet[1]}.mp4" in files else None
                found.append({"update": int(sheet[1]), "file": sheet[0], "clip": clip, "version": version})
        return sorted(found, key=lambda one: one["update"])

    def sheet(self, update: int) -> dict[str, Any]:
        """The pictures in a sheet: `cells` of caption, left, top, width and height; None where it does not tell.

        Raises LookupError: there is no such sheet.
        """
        sample = _only(one for one in self.samples() if one["update"] == update)
        return {**sample, "cells": self._sheet(sample["file"], sample["version"])}

    def _read_sheet(self, file: str, version: str) -> list[list] | None:
        size = min(self._size(f"{SAMPLES}/{file}"), MOST_SHEET_BYTES)
        for most in sorted({min(size, HEADER_BYTES), size}):
            content = io.BytesIO(self.place.read(f"{self.prefix}{SAMPLES}/{file}", 0, most))
            try:
                if (cells := cells_in(content)) is not None:
                    return [[clean(caption), *cell[1:]] for caption, cell in numbered(cells).items()]
            except (
                OSError,
                ValueError,
                SyntaxError,
                Image.DecompressionBombError,
            ):  # the page says so
                continue
        return None

    def picture(self, file: str) -> tuple[str, str, int]:
        """The name in the place, the type, and the size of a sheet or a clip. Raises LookupError: there is none."""
        names = {name for one in self.samples() for name in (one["file"], one["clip"]) if name}
        if file not in names:
            raise LookupError(file)
        return f"{self.prefix}{SAMPLES}/{file}", TYPES[file[-4:]], self._size(f"{SAMPLES}/{file}")


def _only(found: Iterable[T]) -> T:
    for one in found:
        return one
    raise LookupError("there is none")


def _note(line: bytes) -> dict[str, Any]:
    found = _object(line)
    note: dict[str, Any] = {
        key: clean(found[key]) for key in ("text", "state", "command", "folder") if isinstance(found.get(key), str)
    }
    if "text" not in note:
        note["text"] = "a line that no run wrote"
    seconds = _number(found.get("time"))
    if seconds is not None and 0 < seconds < 1e11:
        note["time"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    return note | {"update": _count(found.get("update"))}


def _command(started: dict[str, Any]) -> str:
    """What starts a run again, wherever one is."""
    folder = started.get("folder")
    return f"cd {shlex.quote(folder)} && {started['command']}" if folder else started["command"]


def _object(content: bytes) -> dict[str, Any]:
    try:
        found = parse_json(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < 2**53 else None


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and abs(value) < TOO_LARGE else None  # nor NaN


def _shown(value: Any) -> str:
    """A value of a config on one line."""
    return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
