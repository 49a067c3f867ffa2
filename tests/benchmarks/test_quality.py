"""Techniques are compared with the same training without them, and what is known is not trained again."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import quality
from benchmarks.gpu_scripts import use_case
from benchmarks.quality import CASES, SCORES, scores_of
from warpcore.config import load_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
CONFIGS = Path(__file__).parents[2] / "configs" / "training"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_technique_changes_a_config_of_its_script(case):
    given = [str(CONFIGS / f"{case.config}.yaml"), *case.given, "device=cpu"]
    kind = use_case(case.script).Config
    off = load_config(kind, given)
    for technique in case.techniques.values():
        assert load_config(kind, [*given, *technique.changes]) != off


def test_means_of_seeds_stand_beside_those_without(tmp_path, monkeypatch, capsys):
    """Trained once for each seed and technique; an average of snapshots is made and scored in place of its run."""
    commands = []

    def run(*words):
        commands.append([str(word) for word in words])
        settings = dict(word.split("=", 1) for word in commands[-1] if "=" in word)
        folder = Path(settings["checkpoint_path"], settings["experiment_id"]) if "seed" in settings else words[2]
        folder.mkdir(parents=True)
        if "seed" in settings:
            loss = 0.5 + 0.001 * int(settings["seed"]) + 0.01 * ("came" in folder.name)
            lines = [{"update": 6, "validation_loss": 9.0}, {"update": 7, "validation_loss": loss}]
            (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))

    def score(folder):
        seed = int(folder.name.removesuffix("_averaged")[-1])
        return {"colour": 0.9 + 0.01 * seed - 0.03 * ("came" in folder.name) + 0.05 * ("averaged" in folder.name)}

    monkeypatch.setattr(quality, "run_command", run)
    monkeypatch.setattr(quality, "score", score)
    words = ["c", "updates=7", "--folder", str(tmp_path), "--only", "came", "post-hoc EMA"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *words])
    quality.main()
    rows = capsys.readouterr().out.splitlines()
    assert rows == [
        "| c, 3 seeds | colour | validation loss x 1000 |",
        "|---|---|---|",
        "| off | 91.0 | 501.0 |",
        "| came | 88.0 (-3.0) | 511.0 (+10.0) |",
        "| post-hoc EMA | 96.0 (+5.0) | 501.0 (+0.0) |",
    ]
    trained = [command for command in commands if command[0].endswith("train_c.py")]
    assert [command[-1] for command in trained] == ["seed=0", "seed=1", "seed=2"] * 3
    assert all("updates=7" in command for command in trained)
    assert len(commands) == len(trained) + 3

    commands.clear()
    quality.main()
    assert capsys.readouterr().out.splitlines() == rows
    assert not commands


def test_a_training_that_fails_ends_the_comparison(tmp_path):
    changes = ["updates=none"]
    with pytest.raises(UserError, match=r"train_sd\.py.* failed"):
        scores_of(CASES["sd"], "came", 0, tmp_path, changes)
    assert not list(tmp_path.rglob(SCORES))
