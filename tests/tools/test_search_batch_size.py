"""The search for a micro-batch: the largest that fits, bucket by bucket, and a config that trains with it."""

import math
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from tests.golden import load_case
from tests.train.test_every_script import SETTINGS, settings, train  # noqa: F401
from tests.warpcore import tiny_clips
from tests.warpcore.data.tars import write_shard as write_clip_shard
from tests.warpcore.runs import TINY, tiny_settings, train_here, write_shard
from tests.warpcore.test_unequal_micro_batches import settings_of
from tools.clip_batch_sizes import ClipSearch, search_between, with_sizes
from tools.search_batch_size import bucket, main, search, with_keys, with_micro_batch
from warpcore.config_files import read_config
from warpcore.data.clip_buckets import ClipBuckets, rungs_of
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


@pytest.mark.parametrize(
    "block",
    [
        "bucket_config:\n  480p: {1: [1.0, 4]}\n\n  # long ones\n# more\n  240p:\n    1: [1.0, 8]  # gone\n",
        "bucket_config: {\n  480p: {1: [1.0, 4]},\n  240p: {1: [1.0, 8]}\n}\n",
        "bucket_config: {480p: {1: [1.0, 4]}}\n",
    ],
)
def test_a_value_of_several_lines_is_replaced_as_a_whole(block):
    written = with_keys(f"lr: 1\n{block}\n# next\nseed: 3\n", ["seed=4"], {"bucket_config": "\n  480p: {1: [1.0, 6]}"})
    assert written == "lr: 1\nbucket_config: \n  480p: {1: [1.0, 6]}\n\n# next\nseed: 4\n"


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


GOLDEN = load_case("opensora/search_batch_size")[0]["calls"]


@pytest.mark.parametrize("call", GOLDEN, ids=lambda call: f"{call['lower']} to {call['upper']}")
def test_sizes_of_clips_are_searched_as_the_reference_does(call):
    tried = []

    def seconds_of(size):
        tried.append(size)
        if size > call["out_of_memory_above"]:
            return None
        return call["time"]["fixed"] + call["time"]["per_sample"] * size

    found = search_between(call["lower"], call["upper"], seconds_of, call["reference_time"])
    assert tried == call["tried"]
    assert found == (call["batch_size"], pytest.approx(call["step_time"]))


class ClipMachine:
    """Stands for a rehearsal of clips: time and memory grow with the pixels of all samples."""

    def __init__(self, entries: dict, memory: float = float("inf")):
        config = SimpleNamespace(buckets=lambda factor: ClipBuckets(rungs_of(with_sizes(entries, {}), factor)))
        self.run, self.memory, self.asked = SimpleNamespace(config=config, bucket_factor=8), memory, set()

    def measure(self, size, count):
        self.asked.add(size)
        pixels = math.prod(size) * count / 1e6
        return (0.1 + pixels / 10, int(pixels)) if pixels <= self.memory else None


ENTRIES = {"144p": {1: (1.0, (400, 100)), 17: (1.0, (20, 10))}, "240p": {1: (0.5, 30), 17: (0.5, 8), 34: (0.0, None)}}


def sizes_found(search: ClipSearch) -> dict:
    return {name: {n: size for n, (_, size) in of.items()} for name, of in with_sizes(ENTRIES, search.found).items()}


def test_each_bucket_gets_the_largest_size_within_its_range_that_fits():
    search = ClipSearch(ClipMachine(ENTRIES, memory=15), ENTRIES)
    search.search(None, None, None)
    assert sizes_found(search) == {"144p": {1: 406, 17: 23}, "240p": {1: 45, 17: 8, 34: None}}


def test_all_buckets_get_the_time_of_a_base_bucket():
    machine = ClipMachine(ENTRIES, memory=15)
    search = ClipSearch(machine, ENTRIES)
    search.search(None, ("144p", 17), None)
    found = sizes_found(search)
    assert found["144p"][17] == 23
    base = machine.measure((17, 192, 192), 23)[0]
    for name, num_frames, size in (("144p", 1, (192, 192)), ("240p", 17, (320, 320))):
        seconds = machine.measure((num_frames, *size), found[name][num_frames])[0]
        assert 0.85 * base < seconds < 1.02 * base
    assert found["240p"][1] == 45, "the most within its range, which takes less"


def test_one_resolution_alone_and_the_time_of_a_step():
    search = ClipSearch(ClipMachine(ENTRIES), ENTRIES, spread=3)
    search.search("240p", None, 2.0)
    assert sizes_found(search) == {"144p": {1: 400, 17: 20}, "240p": {1: 33, 17: 10, 34: None}}
    assert not search.without
    search.search("240p", None, 0.2)
    assert search.without == ["240p x 17 frames, 5 to 11", "240p x 1 frame, 27 to 33"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("480p", None, None), "--resolution 480p: bucket_config has 144p, 240p"),
        ((None, ("240p", 34), None), "--base 240p:34 is no bucket that keeps samples: write one of 240p:17, 240p:1"),
    ],
)
def test_buckets_that_are_not_there(arguments, message):
    with pytest.raises(UserError, match=message):
        ClipSearch(ClipMachine(ENTRIES), ENTRIES).search(*arguments)


def test_steps_in_the_backward_pass_leave_nothing_to_search(tmp_path, monkeypatch):
    keys = {"fused_backward": True, "clip_grad_norm": None}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_settings(tmp_path, tmp_path / "a.tar", **keys)))
    monkeypatch.setattr(sys, "argv", ["search", str(TINY), str(tmp_path / "c.yaml"), str(tmp_path / "tuned.yaml")])
    with pytest.raises(UserError, match=r"fused_backward: .* or search with fused_backward=false"):
        main()


def test_a_bucket_on_the_command_line():
    assert bucket("144p:51") == ("144p", 51)
    for wrong in ("144p", "144p:x", ":51"):
        with pytest.raises(ArgumentTypeError, match="write resolution:frames, such as 144p:51"):
            bucket(wrong)


@pytest.mark.integration
def test_a_search_of_clips_writes_a_config_that_trains(tmp_path, monkeypatch, capsys):
    data = write_clip_shard(tmp_path / "a.tar", 12, sizes=((16, 16),))
    buckets = {"16px": {4: [1.0, [6, 3]], 1: [[1.0, 0.9], [9, 2]]}}
    given = settings_of(tmp_path, data, bucket_config=buckets, updates=1, save_every=1, validation_samples=0)
    (tmp_path / "c.yaml").write_text("# why\n" + yaml.safe_dump(given))
    script, tuned = Path(tiny_clips.__file__), tmp_path / "tuned.yaml"
    monkeypatch.setattr(
        sys, "argv", ["search", str(script), str(tmp_path / "c.yaml"), str(tuned), "--max-memory", "1"]
    )
    main()
    assert "| 16px x 4 frames | 9 |" in capsys.readouterr().out
    written, _ = read_config(tuned)
    assert tuned.read_text().startswith("# why\n")
    of_clips, (keep, size) = written["bucket_config"]["16px"][4], written["bucket_config"]["16px"][1]
    assert of_clips == [1.0, 9]
    assert keep == [1.0, 0.9]
    assert size == 11
    assert train_here(written, tiny_clips.ClipDenoiser, tiny_clips.ClipConfig)[0] == 0
    with pytest.raises(UserError, match=r"\[6, 3\] is a guess and a range.*tools/search_batch_size.py"):
        train_here(given | {"experiment_id": "untuned"}, tiny_clips.ClipDenoiser, tiny_clips.ClipConfig)
