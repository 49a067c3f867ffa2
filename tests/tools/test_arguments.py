"""What the tools refuse before they begin."""

import importlib
import sys

import pytest

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
