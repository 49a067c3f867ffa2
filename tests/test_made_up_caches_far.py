"""Caches of pictures and of texts, joined: read from S3, on several processes, and resumed exactly."""

from pathlib import Path

import pytest

from tests.many_processes import launch_processes
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.test_made_up_caches import both
from tests.test_made_up_caches import of_family as of_family
from tests.test_made_up_caches import settings as settings
from tests.test_made_up_family import SCRIPT, config_file, losses, run_tool, train
from tests.test_made_up_family import _known as _known
from tests.warpcore.runs import numbers, read_metrics
from tools import cache
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def caches(settings, tmp_path) -> dict[str, str]:
    return dict(zip(("latents", "texts"), both(settings, tmp_path), strict=True))


@pytest.fixture
def given(settings, caches) -> dict:
    """Of a run of six updates, of two micro-batches each, on caches alone."""
    alone = {"webdataset_path": None, "caches": list(caches.values())}
    return settings | alone | {"updates": 6, "save_every": 3, "micro_batch_size": 2}


@pytest.mark.bits
def test_joined_caches_on_s3_are_those_of_a_disk_and_a_run_from_them_goes_on(given, caches, bucket, tmp_path):
    expected = numbers(train(given))
    there = [bucket.upload(tmp_path / name, f"{name}/") for name in caches]
    train(given, experiment_id="halves", caches=there, updates=3)
    assert numbers(train(given, experiment_id="halves", caches=there)) == expected


def test_of_joined_caches_on_s3_one_that_changed_stops_the_run(given, caches, bucket, tmp_path, settings):
    there = [bucket.upload(tmp_path / name, f"{name}/") for name in caches]
    train(given, experiment_id="halves", caches=there, updates=3)
    texts = (tmp_path / "texts" / "two" / "a.tar").read_bytes()
    bucket.put("texts/two/a.tar", texts.replace(b"picture 7", b"pictures!"))
    with pytest.raises(UserError, match="the data is not what the checkpoint was made with: of the tars with letters"):
        train(given, experiment_id="halves", caches=there)


@pytest.mark.slow
@pytest.mark.bits
def test_joined_caches_on_two_processes_go_on_exactly_and_on_another_number(given, caches, bucket, tmp_path):
    alone = train(given)
    together = given | {"experiment_id": "together"}
    launch_processes(2, train, together)
    whole = read_metrics(together)
    assert [line["samples_hash"] for line in whole] == [line["samples_hash"] for line in alone]
    assert losses(whole) == pytest.approx(losses(alone), rel=1e-5)
    there = [bucket.upload(tmp_path / name, f"{name}/") for name in caches]
    halves = given | {"experiment_id": "halves", "caches": there}
    launch_processes(2, train, halves | {"updates": 3})
    launch_processes(2, train, halves)
    assert numbers(read_metrics(halves)) == numbers(whole)
    changing = given | {"experiment_id": "changing"}
    launch_processes(2, train, changing | {"updates": 3})
    found = train(changing)
    assert [line["samples_hash"] for line in found] == [line["samples_hash"] for line in alone]
    assert losses(found) == pytest.approx(losses(alone), rel=1e-5)


def _cache_texts(config: Path, out: Path) -> None:
    run_tool(cache.main, SCRIPT, config, out, "--features", "texts")


@pytest.mark.slow
@pytest.mark.bits
def test_texts_are_encoded_by_two_processes_as_by_one(settings, tmp_path):
    config = config_file(settings, tmp_path)
    for count in (1, 2):
        launch_processes(count, _cache_texts, config, tmp_path / str(count))
    alone, together = (
        {path.relative_to(out): path.read_bytes() for path in out.rglob("*.tar")}
        for out in (tmp_path / "1", tmp_path / "2")
    )
    assert len(alone) == 2
    assert together == alone
