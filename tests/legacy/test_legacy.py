"""Runs, caches, indexes and weights of commit 05eb4cd are of use as they were: see README.md beside."""

import importlib
import json
import os
import sys
from pathlib import Path

import boto3
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from inference import text_to_image
from tests.legacy import old_cascade
from tests.legacy.conftest import HERE
from tests.s3_server import Bucket, s3_endpoint, talk_to
from warpcore.config import load_config
from warpcore.data.catalog import open_catalog
from warpcore.data.index import read_rows
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
EXPECTED = json.loads((HERE / "expected.json").read_text())
s3_endpoint = s3_endpoint


def go_on(place: str, config: str, *arguments: str):
    """Start an old run again, as the present scripts do; returns the run, which has ended."""
    use_case = use_case_of(place)
    run = use_case(load_config(use_case.Config, [config, f"updates={len(EXPECTED[place]['lines'])}", *arguments]))
    assert run.run() == 0
    return run


def use_case_of(place: str):
    return getattr(importlib.import_module(EXPECTED[place]["script"]), EXPECTED[place]["use_case"])


def check_lines(folder: Path, place: str) -> None:
    """The run did what the old commit does when nothing stops it."""
    expected = EXPECTED[place]["lines"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [line["update"] for line in expected]
    for line, old in zip(lines, expected, strict=True):
        assert line["samples_hash"] == old["samples_hash"], f"update {old['update']} sees other samples"
        for name in old.keys() - {"update", "samples_hash"}:
            assert line[name] == pytest.approx(old[name], rel=1e-5), f"{name} of update {old['update']}"


REPRESENTATIVE = ("tiny", "stage_c", "stage_b_x0", "lora", "controlnet", "cached", "data", "cache")


def variants(names):
    """The names as parameters; those that another one represents are slow."""
    return [pytest.param(name, marks=() if Path(name).name in REPRESENTATIVE else pytest.mark.slow) for name in names]


NAMED = {"runs/doubled": "a.tar", "runs/repeated_keys": "r.tar"}
"""Runs on data that mean something else now, and what a run that stops at them names."""
GOES_ON = [place for place in EXPECTED if place.startswith("runs/") and place not in NAMED]


@pytest.mark.parametrize("place", variants(GOES_ON))
def test_an_old_run_goes_on_as_the_old_commit_would(old_files, place):
    go_on(place, f"configs/{Path(place).name}.yaml")
    check_lines(Path(place), place)


@pytest.mark.parametrize("place", NAMED)
def test_an_old_run_on_data_that_mean_something_else_now_goes_on_or_names_them(old_files, place):
    goes_on_or_names(place, NAMED[place])


def test_an_old_run_whose_data_were_copied_goes_on_or_names_them(old_files):
    os.utime("data/a.tar")
    goes_on_or_names("runs/tiny", "a.tar")


def goes_on_or_names(place: str, tar: str) -> None:
    """The run goes on as the old commit would, or stops, names the tar, and goes on where that is accepted."""
    config, refusal = f"configs/{Path(place).name}.yaml", None
    try:
        go_on(place, config)
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        check_lines(Path(place), place)
        return
    assert tar in refusal
    assert "on_data_change: new_epoch" in refusal
    assert go_on(place, config, "on_data_change=new_epoch").update == 4
    lines = (Path(place) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["update"] for line in lines] == [1, 2, 3, 4]


@pytest.mark.parametrize("place", ["runs/stage_c", pytest.param("runs/lora", marks=pytest.mark.slow)])
def test_an_old_run_goes_on_from_the_config_in_its_folder(old_files, place):
    go_on(place, f"{place}/config.yaml")
    check_lines(Path(place), place)


def test_an_old_run_on_s3_goes_on_as_the_old_commit_would(old_files, s3_endpoint, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "key")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    talk_to(s3_endpoint, monkeypatch)
    bucket = Bucket(boto3.client("s3"), old_cascade.BUCKET)
    bucket.upload(old_files / "s3")
    run = go_on("s3://legacy/runs/tiny", "s3/runs/tiny/config.yaml")
    check_lines(run.config.run_folder, "s3://legacy/runs/tiny")
    keys = bucket.list_keys()
    assert "runs/tiny/state/00000004/manifest.json" in keys
    assert "data/a.tar.index.parquet" in keys


@pytest.mark.parametrize("path", variants(["data", "quotes", "cache", "cache_bpe"]))
def test_old_indexes_are_replaced_with_one_message_and_keep_their_rows(old_files, path, caplog):
    old = {name: pq.read_table(f"{name}.index.parquet") for name in map(str, sorted(Path(path).glob("*.tar")))}
    catalog = open_catalog(resolve_sources(path))
    assert len(catalog) == len(old)
    (record,) = caplog.records
    told = f"{len(old)} of {len(old)} tars have an index of an earlier version, without a hash of their content"
    assert record.message.startswith(told)
    assert "tools/index_dataset.py" in record.message
    assert len(open_catalog(resolve_sources(path))) == len(old)
    assert len(caplog.records) == 1, "the next start finds the new indexes"
    for number, rows in enumerate(old.values()):
        now = read_rows(catalog.shard(number), rows.column_names)
        assert now.equals(rows.replace_schema_metadata(None))


@pytest.mark.parametrize("name", variants(old_cascade.DRAWINGS))
def test_old_weights_draw_as_before(old_files, name, monkeypatch):
    arguments = [*old_cascade.DRAWINGS[name], *old_cascade.DRAWN, "--output_path", "drawn"]
    monkeypatch.setattr(sys, "argv", ["text_to_image.py", *arguments])
    text_to_image.main()
    (drawn,) = Path("drawn").glob("0000_*.png")
    pictures = [np.asarray(Image.open(path)).astype(int) for path in (drawn, Path("drawings", f"{name}.png"))]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
