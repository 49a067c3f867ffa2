"""A new run goes on from another run's checkpoint (`load`): as that one would have, and without changing it."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.warpcore.runs import load_weights, numbers, tiny_settings, train_here, write_shard
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path) -> dict:
    """Of a run that stands at update 8 of 12."""
    write_shard(tmp_path / "a.tar", 10)
    settings = tiny_settings(tmp_path / "runs", tmp_path / "a.tar")
    assert train_here(settings | {"updates": 8})[0] == 0
    return settings


def loaded(settings: dict, **changes) -> dict:
    """Settings of a new run that goes on from that one."""
    place = Path(settings["checkpoint_path"]) / settings["experiment_id"]
    return settings | {"experiment_id": "new", "load": str(place)} | changes


def content(settings: dict) -> dict[str, bytes]:
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"]
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_weights_average_optimizer_and_samples_are_those_of_a_run_without_a_break(settings, capfd):
    before, new = content(settings), loaded(settings)
    _, lines = train_here(new)
    told = " ".join(capfd.readouterr().err.split())
    assert "tiny is at update 8, from which this run goes on" in told
    assert content(settings) == before
    _, whole = train_here(settings | {"experiment_id": "whole"})
    assert numbers(lines) == numbers(whole[8:])
    for name in ("generator", "generator_ema"):
        expected = load_weights(settings | {"experiment_id": "whole"}, name)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in load_weights(new, name).items())


def test_later_starts_go_on_from_the_run_itself(settings):
    new = loaded(settings, updates=10, save_every=1)
    train_here(new)
    shutil.rmtree(new["load"])
    status, lines = train_here(new | {"updates": 12})
    assert (status, [line["update"] for line in lines]) == (0, [9, 10, 11, 12])


def test_a_damaged_checkpoint_is_passed_over_and_left(settings, caplog):
    state = Path(settings["checkpoint_path"], "tiny", "state")
    (state / "00000008" / "state.json").write_text("{}")
    _, lines = train_here(loaded(settings, updates=6))
    assert [line["update"] for line in lines] == [5, 6]
    assert "the checkpoint of update 8 is damaged (" in caplog.text
    assert sorted(path.name for path in state.iterdir()) == ["00000004", "00000008"]


def test_a_run_without_a_whole_checkpoint_is_not_to_be_emptied(settings):
    for state in Path(settings["checkpoint_path"], "tiny", "state").iterdir():
        (state / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"load: no checkpoint in .*tiny is whole \(update 8: .*\): name another run"):
        train_here(loaded(settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load": "nowhere"}, r"load: nowhere has no checkpoint \(state/00001000, \.\.\.\): name the folder of a"),
        ({"load": "s3://bucket/run"}, "load: s3://bucket/run "),
        ({"updates": 8}, r"load: .*tiny is at update 8, .* and updates is 8; write a larger number"),
        ({"width": 4}, r"the checkpoint of update 8 in .*tiny is of another model: "),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused(settings, changes, message):
    with pytest.raises(UserError, match=message):
        train_here(loaded(settings, **changes))
    if "updates" not in changes:
        status, lines = train_here(loaded(settings))  # nothing of the attempt stands in the way
        assert (status, lines[0]["update"]) == (0, 9)
