"""`2e` of a key that counts updates: what it means, that runs keep to it, and that nothing else needs data for it."""

import json

import pytest

from tests.warpcore.runs import read_metrics, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import Config, ConfigError, dump_config, make_config
from warpcore.epochs import IN_UPDATES
from warpcore.errors import UserError
from warpcore.rehearsal import Rehearsal

GIVEN = {"experiment_id": "a", "checkpoint_path": "runs", "updates": 1, "batch_size": 8, "webdataset_path": "a.tar"}


@pytest.mark.parametrize(
    ("text", "rows", "expected"),
    [
        ("2e", 56, 14),
        ("0.5e", 72, 4),
        ("10", 56, 10),
        ("100_000", 56, 100_000),
    ],  # the reference's rule has 4.5 updates
)
def test_numbers_are_read_as_by_the_reference(text, rows, expected):
    config, _ = make_config(Config, GIVEN | {"updates": text}).in_updates(lambda: rows)
    assert config.updates == expected


@pytest.mark.parametrize(("text", "expected"), [("1e", 1), ("10e", 18), ("0.01e", 1), ("0.29e", 1), ("1.6e", 3)])
def test_epochs_are_multiplied_before_they_are_rounded_down(text, expected):
    assert make_config(Config, GIVEN | {"updates": text}).in_updates(lambda: 15)[0].updates == expected


def test_decimal_fractions_are_no_binary_ones():
    config = make_config(Config, GIVEN | {"updates": "0.29e", "batch_size": 1})
    assert config.in_updates(lambda: 100)[0].updates == 29


def test_exports_in_epochs_keep_to_saves_in_epochs():
    config = make_config(Config, GIVEN | {"save_every": "0.5e", "export_every": "2e", "batch_size": 1})
    counted, lines = config.in_updates(lambda: 7)
    assert (counted.save_every, counted.export_every) == (3, 12)
    assert lines[1].startswith("export_every: 2e is 12 updates")


def test_without_epochs_nobody_asks_for_the_rows():
    def rows():
        raise AssertionError("a pass over the index of a large data set takes time")

    config = make_config(Config, GIVEN)
    assert config.in_updates(rows) == (config, [])


@pytest.mark.parametrize("text", ["ten", "0e", "-1e", "e", "2 e", "2.e", "1e3", "0", "2.5"])
@pytest.mark.parametrize("key", IN_UPDATES)
def test_what_is_no_number_of_either_is_one_error(key, text):
    if (key, text) == ("warmup_updates", "0"):
        assert make_config(Config, GIVEN | {key: text}).warmup_updates == 1
        return
    with pytest.raises(ConfigError, match=rf"{key}: found '{text}', but .*, or a number of epochs, as 2e") as error:
        make_config(Config, GIVEN | {key: text})
    assert len(str(error.value).splitlines()) == 2


def test_numbers_that_contradict_each_other_as_updates_are_an_error():
    config = make_config(Config, GIVEN | {"save_every": 3, "export_every": "1e"})
    with pytest.raises(UserError, match="export_every: 4 is no multiple of save_every 3"):
        config.in_updates(lambda: 32)
    config = make_config(Config, GIVEN | {"updates": "2e", "lr_schedule": "lambdalinear", "cycle_lengths": [5],
                                          "warm_up_steps": [0]})  # fmt: skip
    with pytest.raises(UserError, match="updates: 8 are more than the 5"):
        config.in_updates(lambda: 32)


@pytest.mark.integration
def test_a_run_makes_the_updates_of_its_epochs_of_what_is_drawn(tmp_path, capsys):
    """Two sources, one of them counting twice, of two shapes, with rows that are rejected."""
    write_shard(tmp_path / "a.tar", 17)
    write_shard(tmp_path / "b.tar", 4, (8, 32), first=100)
    sources = [str(tmp_path / "a.tar"), {"path": str(tmp_path / "b.tar"), "weight": 2}]
    settings = tiny_settings(
        tmp_path / "runs", tmp_path, webdataset_path=sources, multi_aspect_ratio=[1.0, 4.0], updates="3e",
        save_every="1e", warmup_updates="0.5e", dataset_filters=[["score", "lambda s: s != 3"]], keep_last=9,
    )  # fmt: skip
    rows = 16 + 4 * 2
    status, lines = train_here(settings)
    assert status == 0
    assert [line["update"] for line in lines] == list(range(1, 3 * rows // 4 + 1))
    assert [line["lr"] for line in lines[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    run = tmp_path / "runs/tiny"
    assert sorted(int(folder.name) for folder in (run / "state").iterdir()) == [6, 12, 18]
    assert "updates: 3e is 18 updates (an epoch is 24 rows, 6.00 updates)" in capsys.readouterr().err
    assert "updates: 18" in (run / "config.yaml").read_text()
    (state,) = json.loads((run / "state/00000018/state.json").read_text())["feed"]["lane_states"].values()
    drawn = state["epoch"] * rows + state["cursor"]
    assert drawn == 3 * rows + sum(map(len, state["waiting"].values()))

    assert train_here(settings)[0] == 0  # the same keys, and nothing left to do
    assert len(read_metrics(settings)) == 18


def test_updates_without_data_do_not_need_to_know_the_epoch(tmp_path):
    config = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path / "missing.tar", updates="2e", save_every="1e"))
    with Rehearsal(Denoiser, config, 2**30) as rehearsal:
        assert rehearsal.update((16, 16), 2) > 0
    assert "updates: 2e" in dump_config(config)
