"""What the tools refuse before they begin."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest

from tools.arguments import local_path

URL = "s3://bucket/folder"


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("build_dataset", ["pictures", URL]),
        ("build_dataset", [URL, "shards"]),
        ("build_dataset", ["pictures", "shards", "--metadata", URL]),
        ("cache", ["train/train_c.py", "config.yaml", URL]),
        ("convert_weights", ["a.safetensors", URL]),
        ("export", ["diffusers", URL, "exported"]),
        ("export", ["diffusers", "run", URL]),
        ("make_demo_dataset", [URL]),
        ("make_demo_subject", [URL]),
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
