"""The search for a micro-batch: the largest that fits, bucket by bucket, and a config that trains with it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.test_every_script import SETTINGS, settings, train  # noqa: F401
from tests.warpcore.runs import TINY, tiny_settings, train_here, write_shard
from tools.search_batch_size import main, search, with_micro_batch
from warpcore.config_files import read_config
from warpcore.errors import UserError


class Machine:
    """Stands for a rehearsal: a sample takes a byte and, in batches, ever less time; more than `limit` do not fit."""

    def __init__(self, limit: int):
        self.limit, self.asked = limit, []

    def measure(self, size, count):
        self.asked.append(count)
        return (1 + count / 100, count) if count <= self.limit else None


FITTING = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]


@pytest.mark.parametrize("guess", [1, 5, 16, 96, 1000])
@pytest.mark.parametrize("limit", [1, 2, 7, 16, 95, 96, 500])
def test_the_largest_that_fits_is_found_and_no_size_is_tried_twice(guess, limit):
    machine = Machine(limit)
    assert search(machine, (8, 8), FITTING, guess, None, "size") == max(n for n in FITTING if n <= limit)
    assert len(machine.asked) == len(set(machine.asked))


def test_time_is_a_limit_too_and_speed_may_choose():
    assert search(Machine(96), (8, 8), FITTING, 8, 1.20, "size") == 16
    assert search(Machine(40), (8, 8), FITTING, 8, None, "speed") == 32


def test_nothing_fits():
    with pytest.raises(UserError, match="8 x 8 px cannot even be trained with 1 sample"):
        search(Machine(0), (8, 8), FITTING, 8, None, "size")


def test_the_config_keeps_its_comments():
    text = "# why\nbatch_size: 8\ngrad_accum_steps: 2 # gone\nmulti_aspect_ratio:\n  - 1\n  - 2\nlr: 1.0e-4\n"
    written = with_micro_batch(text, 4, ["batch_size=16", "multi_aspect_ratio=[1]"])
    assert yaml.safe_load(written) == {"batch_size": 16, "micro_batch_size": 4, "multi_aspect_ratio": [1], "lr": 1e-4}
    assert written.startswith("# why\n")


@pytest.mark.slow
@pytest.mark.integration
def test_a_search_at_the_command_line_writes_a_config_that_trains(tmp_path):
    data = write_shard(tmp_path / "a.tar", 8)
    given = tiny_settings(tmp_path, data, updates=1, batch_size=8, multi_aspect_ratio=[1, 4])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(given | {"grad_accum_steps": 1}))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "c.yaml").write_text("base: ../base.yaml\nseed: 3\n")
    script = Path(__file__).parents[2] / "tools" / "search_batch_size.py"
    command = [
        sys.executable,
        str(script),
        str(TINY),
        str(tmp_path / "configs" / "c.yaml"),
        str(tmp_path / "tuned.yaml"),
    ]
    environment = {"PYTHONPATH": str(script.parents[1]), "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert refused.returncode == 2
    assert "--max-memory" in refused.stderr
    done = subprocess.run([*command, "--max-memory", "0.0003"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    tuned, _ = read_config(tmp_path / "tuned.yaml")
    assert tuned["seed"] == 3
    assert 1 <= tuned["micro_batch_size"] < 8
    assert "too much memory" in done.stdout
    assert train_here(tuned)[0] == 0


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_micro_batch_is_found_for_every_script(settings, name, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(name, "searched", batch_size=4, updates=1, save_every=1)))
    script = Path(__file__).parents[2] / "train" / f"{name.split()[0]}.py"
    arguments = [str(script), str(tmp_path / "c.yaml"), str(tmp_path / "tuned.yaml"), "--max-memory", "1"]
    monkeypatch.setattr(sys, "argv", ["search_batch_size.py", *arguments])
    main()
    tuned, _ = read_config(tmp_path / "tuned.yaml")
    assert tuned["micro_batch_size"] == 4
    assert len(train(name, tuned)) == 1
