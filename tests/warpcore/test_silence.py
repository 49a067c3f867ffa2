"""A run writes its own lines to the terminal and nothing else: no warning of a library about what is meant to be."""

import re
import warnings

import pytest
import torch

from tests.warpcore.runs import finish, start, tiny_settings, torchrun, write_shard
from warpcore.data.loader import Loader
from warpcore.data.reader import Reader

OWN_LINES = re.compile(
    r"\s*(\d+%\|.*|training data: .*|epoch \d+ is over: .*|update \d+: samples in .*|\S+ is at update \d+.*"
    r"|keys that are not at their defaults:|  \S.*)?"
)


@pytest.mark.integration
@pytest.mark.parametrize(
    "launcher", [pytest.param((), marks=pytest.mark.slow), torchrun(2)], ids=["one process", "two processes"]
)
def test_a_run_and_its_resumption_write_only_their_own_lines(launcher, tmp_path):
    settings = tiny_settings(
        tmp_path / "runs", write_shard(tmp_path / "a.tar", 10), validation_samples=2, num_workers=1, updates=2
    )
    for updates in (2,) if launcher else (2, 4):
        status, output = finish(start(settings | {"updates": updates}, launcher=launcher), 240)
        assert status == 0, output
        assert [line for line in re.split(r"[\r\n]+", output) if not OWN_LINES.fullmatch(line)] == []


@pytest.mark.integration
def test_more_workers_than_cpus_are_no_warning(monkeypatch):
    monkeypatch.setattr(torch._utils, "cpu_count", lambda: 0)
    with warnings.catch_warnings(), Loader([], Reader(captions=None), num_workers=1) as loader:
        warnings.simplefilter("error")
        assert list(loader) == []
