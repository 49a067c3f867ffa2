"""notes.jsonl: what a run told people, how it was started, and how that ended."""

import json
import os
import shlex
import sys

import pytest

from tests.warpcore.runs import tiny_settings, train_here, write_shard
from tests.warpcore.test_redaction import SECRET, URLS
from tests.warpcore.tiny import Denoiser
from warpcore.notes import Notes, start_command


def notes_of(settings: dict) -> list[dict]:
    path = f"{settings['checkpoint_path']}/{settings['experiment_id']}/notes.jsonl"
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def states(notes: list[dict]) -> list[tuple[int, str]]:
    return [(note["update"], note["state"]) for note in notes if "state" in note]


class Stopped(Denoiser):
    def make_update(self, batches):
        super().make_update(batches)
        if self.update == 2:
            self._request_stop(15)


class Broken(Denoiser):
    def make_update(self, batches):
        if self.update == 4:
            raise RuntimeError(f"no more of {URLS[0]}")
        super().make_update(batches)


@pytest.mark.integration
def test_each_start_tells_of_its_command_and_of_its_end(tmp_path):
    settings = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 8), updates=5)
    assert train_here(settings, Stopped)[0] != 0
    with pytest.raises(RuntimeError):
        train_here(settings, Broken)
    assert train_here(settings)[0] == 0
    notes = notes_of(settings)
    assert states(notes) == [
        (0, "running"), (3, "stopped"), (3, "running"), (4, "failed"), (4, "running"), (5, "finished"),
    ]  # fmt: skip
    command = shlex.split(notes[0]["command"])
    assert command[len(command) - len(sys.argv[1:]) :] == sys.argv[1:]
    assert notes[0]["folder"] == os.getcwd()
    (failed,) = (note["text"] for note in notes if note.get("state") == "failed")
    assert failed.startswith("RuntimeError: no more of")
    assert SECRET not in failed
    assert any("samples in" in note["text"] for note in notes)
    assert [note["time"] for note in notes] == sorted(note["time"] for note in notes)
    assert train_here(settings)[0] == 0
    assert notes_of(settings) == notes, "a start that has nothing to do says nothing"


@pytest.mark.integration
def test_a_bad_sample_is_noted_with_its_name(tmp_path):
    shard = write_shard(tmp_path / "a.tar", 8)
    content = shard.read_bytes()
    pixels = content.index(b"IDAT") + 8
    shard.write_bytes(content[:pixels] + b"no pixels" + content[pixels + 9 :])
    settings = tiny_settings(tmp_path / "runs", shard, updates=2)
    train_here(settings)
    assert any(note["text"].startswith("bad sample") and "a.tar" in note["text"] for note in notes_of(settings))


@pytest.mark.parametrize(
    ("around", "command"),
    [
        ({}, "python3 -u train.py 'a b.yaml' lr=1"),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"},
         "torchrun --nproc-per-node 8 train.py 'a b.yaml' lr=1"),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "16"},
         "torchrun --nnodes 2 --nproc-per-node 8 train.py 'a b.yaml' lr=1"),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"},
         "srun --nodes=2 --ntasks=16 python3 -u train.py 'a b.yaml' lr=1"),
    ],
)  # fmt: skip
def test_the_command_is_that_of_the_launcher(monkeypatch, around, command):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in around.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-u", "train.py", "a b.yaml", "lr=1"])
    monkeypatch.setattr(sys, "argv", ["train.py", "a b.yaml", "lr=1"])
    assert start_command() == command


def test_what_is_noted_holds_no_credentials(tmp_path):
    notes = Notes(tmp_path / "notes.jsonl")
    for url in URLS:
        notes.add(1, f"lost {url}")
    assert SECRET not in (tmp_path / "notes.jsonl").read_text(encoding="utf-8")
