"""What the tools refuse before they begin."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from tools.arguments import amount, local_path, positive, process_count, worker_count

URL = "s3://bucket/folder"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("build_dataset", ["pictures", URL]),
        ("build_dataset", [URL, "shards"]),
        ("build_dataset", ["pictures", "shards", "--metadata", URL]),
        ("cache", ["train/train_c.py", "config.yaml", URL]),
        ("compare_runs", ["run", "other", URL]),
        ("convert_config", [URL, "ours.yaml"]),
        ("convert_weights", ["a.safetensors", URL]),
        ("export", ["diffusers", URL, "exported"]),
        ("export", ["diffusers", "run", URL]),
        ("make_demo_dataset", [URL]),
        ("make_demo_subject", [URL]),
        ("runs", ["runs", "--export", URL]),
    ],
)
def test_a_url_is_no_folder_of_this_machine(tool, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit):
        importlib.import_module(f"tools.{tool}").main()
    told = capsys.readouterr().err
    assert f"{URL} is a URL, but a path of this machine is needed; only webdataset_path" in told
    assert not list(tmp_path.iterdir())


def test_a_key_where_a_path_is_expected_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(argparse.ArgumentTypeError, match="keys follow after all the paths"):
        local_path("webdataset_path=data")
    assert local_path("./date=1") == Path("date=1")
    (tmp_path / "date=1").mkdir()
    assert local_path("date=1") == Path("date=1")


@pytest.mark.parametrize("kind", [amount, positive, process_count, worker_count])
@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "", "ten", "1e400", "\u00b2", "9" * 5000])
def test_a_number_that_means_nothing_is_told_in_short(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"^expected a number above 0, .*found .{,250}$"):
        kind(text)


def test_numbers_of_processes_have_limits_and_amounts_may_be_fractions():
    assert (worker_count("8"), process_count("4096"), positive("6000"), amount("1.5")) == (8, 4096, 6000, 1.5)
    with pytest.raises(argparse.ArgumentTypeError, match="up to 1024, found '1000000'"):
        worker_count("1000000")
    with pytest.raises(argparse.ArgumentTypeError, match="up to 100000, found '1000000'"):
        process_count("1000000")
