"""Making a cache: killed anywhere and finished by others, what it says of itself, and what it refuses."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from itertools import count
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch.multiprocessing import ProcessExitedException

from families.cascade import versions
from families.common import cache_writer
from tests.caches import make_cache, write_pictures
from tests.many_processes import launch_processes
from tools.cache_encoding import Encoding
from warpcore.config import ConfigError
from warpcore.data.catalog import open_catalog
from warpcore.data.index import read_rows
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

ROWS_TOGETHER = 4


@pytest.fixture
def settings(small_cascade, tmp_path, monkeypatch):
    """Of Stage C, for two tars; a tar is written in two pieces."""
    for name, first in (("0", 0), ("1", 8)):
        write_pictures(tmp_path / "pictures" / f"{name}.tar", 8, first, broken=(5,))
    monkeypatch.setattr(cache_writer, "CHUNK_ROWS", ROWS_TOGETHER)
    return small_cascade | {
        "webdataset_path": str(tmp_path / "pictures"), "multi_aspect_ratio": [1, 2],
        "dataset_filters": [["score", "lambda s: s != 3"]],
    }  # fmt: skip


@pytest.mark.parametrize("features", ["all", "texts"])
def test_a_cache_of_nothing_is_an_error_that_names_a_sample(settings, tmp_path, features):
    for path in (tmp_path / "pictures").glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"picture ", b"\xff" * 8))
    of_a_cluster = settings | {"use_fsdp": True, "fsdp_shards": 8}  # caches are made by any number of processes
    with pytest.raises(UserError, match=r"none of the 15 samples could be read: .*the first one is .*0000.*UTF-8"):
        make_cache("train_c", of_a_cluster, tmp_path / "cache", "--features", features)


def content(out: Path) -> dict[str, bytes]:
    """What must not depend on how a cache came about."""
    found = {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}
    for path in out.glob("*.tar.cache.json"):
        record = json.loads(path.read_text())
        assert record.pop("seconds") > 0
        found[path.name] = json.dumps(record).encode()
    return found


def _member(mini: versions.Version, settings: dict, out: Path, killed_in: str | None, number: int) -> None:
    versions.VERSIONS["mini"] = mini
    cache_writer.CHUNK_ROWS = ROWS_TOGETHER
    if killed_in is not None:
        owner = cache_writer.CacheTar if killed_in == "write" else cache_writer
        plain, calls = getattr(owner, killed_in), count(1)

        def deadly(*args):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*args)

        setattr(owner, killed_in, deadly)
    make_cache("train_c", settings, out)


@pytest.mark.bits
def test_a_cache_that_was_killed_is_finished_by_two_processes(settings, tmp_path):
    whole = content(make_cache("train_c", settings, tmp_path / "whole"))
    assert len(whole) == 4
    out, mini = tmp_path / "cache", versions.VERSIONS["mini"]
    for killed_in, number, tars in (("write", 2, 0), ("index_shard", 1, 1)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            launch_processes(1, _member, mini, settings, out, killed_in, number)
        assert len(list(out.glob("*.tar"))) == tars
    first = next(out.glob("*.tar"))
    before = first.stat()
    launch_processes(2, _member, mini, settings, out, None, 0)
    assert content(out) == whole
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not list(out.glob(".*.part"))
    assert (out / "dataset.manifest.parquet").exists()


def _failing_member(mini: versions.Version, settings: dict, out: Path, how: str) -> None:
    """Process 1 fails at its first rows, while process 0 is at work, or when it has nothing left to do."""
    versions.VERSIONS["mini"], rank = mini, int(os.environ["RANK"])
    plain, ended = Encoding._encode_shard, out.with_suffix(f".{rank}")

    def encode_shard(encoding, number, *work):
        if rank == 0 and how == "at work":
            _wait_for(out / ".failed")
        if rank == 1:
            if how != "at work":
                _wait_for(next(encoding.path(other) for other in range(2) if other != number))
            if how == "killed":
                os._exit(0)
            raise OSError(errno.EIO, "the network drive is gone")
        plain(encoding, number, *work)

    Encoding._encode_shard = encode_shard
    try:
        make_cache("train_c", settings, out)
    except (UserError, RuntimeError, OSError) as error:
        ended.write_text(" ".join([str(error), *getattr(error, "__notes__", ())]))


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)


@pytest.mark.parametrize("how", ["at work", "waiting", "killed"])
def test_a_process_that_fails_ends_the_others_which_say_why(settings, tmp_path, how):
    out, mini = tmp_path / "cache", versions.VERSIONS["mini"]
    launch_processes(2, _failing_member, mini, settings, out, how)
    said = (tmp_path / "cache.0").read_text()
    if how == "killed":
        assert "Another process of the run ended" in said
    else:
        assert "another process failed: process 1 on " in said
        assert "the network drive is gone" in said
    assert len(list(out.glob("*.tar"))) == (0 if how == "at work" else 1)
    assert len(content(make_cache("train_c", settings, out))) == 4  # what failed before does not count


def test_rows_keep_their_places_and_what_is_left_out_is_told(settings, tmp_path, capsys):
    out = make_cache("train_c", settings, tmp_path / "cache", "--variants", "2")
    told = capsys.readouterr().out
    for text in (
        "cached 14 of 16 samples",
        "1 left out: ['score', 'lambda s: s != 3']",
        "1 left out: unreadable\n",
        "0.tar/00005.png: ",
        "stored as float16",
        "per sample (2 crops each)",
        "ms with this cache",
    ):
        assert text in told, text
    pictures, catalog = (open_catalog(resolve_sources(str(path))) for path in (settings["webdataset_path"], out))
    for number in range(2):
        columns = ["key", "width", "height", "json.score"]
        assert read_rows(catalog.shard(number), columns) == read_rows(pictures.shard(number), columns)
    assert [catalog.name(number) for number in range(2)] == ["0.tar", "1.tar"]
    assert "latent.npy" in catalog.members
    assert "png" not in catalog.members
    # The source changed: its tar is recreated, the other one stays.
    kept, stale = ((out / name).stat().st_mtime_ns for name in ("0.tar", "1.tar"))
    write_pictures(Path(settings["webdataset_path"]) / "1.tar", 9, 8)
    make_cache("train_c", settings, out, "--variants", "2")
    assert "cached 15 of 17 samples" in capsys.readouterr().out
    assert ((out / "0.tar").stat().st_mtime_ns, (out / "1.tar").stat().st_mtime_ns > stale) == (kept, True)


def refusal(settings: dict, out: Path, *options: str, script: str = "train_c", kind=UserError, **changes) -> str:
    given = {key: value for key, value in (settings | changes).items() if value is not None}
    with pytest.raises(kind) as error:
        make_cache(script, given, out, *options)
    return str(error.value)


def test_what_it_refuses(settings, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    assert "does not exist: the training script comes first" in refusal(settings, out, script="train_x")
    assert "trains on pictures themselves" in refusal(settings, out, script="train_encoder")
    control = {"controlnet_blocks": [1], "controlnet_filter": "InpaintFilter"}
    assert "ControlNet" in refusal(settings, out, script="train_c_controlnet", **control)
    assert "train_encoder" in refusal(settings, out, script="train_b", train_encoder=True, clip_image_dropout=None)
    assert "bucketeer_random_ratio" in refusal(settings, out, kind=ConfigError, bucketeer_random_ratio=0.1)
    assert "no such tar" in refusal(settings, out, webdataset_path=str(tmp_path / "none"))
    empty = write_pictures(tmp_path / "empty.tar", 0)
    assert "holds no sample" in refusal(settings, out, webdataset_path=str(empty))
    unmet = [["score", "lambda s: s > 99"]]
    assert "no sample can be drawn" in refusal(settings, out, dataset_filters=unmet)
    assert "nowhere.safetensors does not exist" in refusal(settings, out, effnet_checkpoint_path="nowhere.safetensors")
    assert not list(out.glob("*.tar"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "is not empty and holds no cache" in refusal(settings, tmp_path / "full")
    loud = {key: t * 1e9 if key == "mapper.0.weight" else t
            for key, t in load_file(tmp_path / "effnet_encoder.safetensors").items()}  # fmt: skip
    save_file(loud, tmp_path / "loud.safetensors")
    message = refusal(settings, tmp_path / "loud", effnet_checkpoint_path=str(tmp_path / "loud.safetensors"))
    assert "can't be stored as float16; write --dtype bfloat16" in message

    make_cache("train_c", settings, out)
    assert "dtype is 'float16' in the cache, 'float32' here" in refusal(settings, out, "--dtype", "float32")
    assert "variants is 1 in the cache, 2 here" in refusal(settings, out, "--variants", "2")
    assert "crop_mode is 'random' in the cache, 'center' here" in refusal(settings, out, crop_mode="center")
    assert "is a cache already" in refusal(settings, tmp_path / "again", webdataset_path=str(out))
    shutil.copy(out / "0.tar", out / "old.tar")
    assert "old.tar mirrors no tar" in refusal(settings, out)
    (out / "old.tar").unlink()
    with (out / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert "another process writes this cache" in refusal(settings, out)


@pytest.mark.bits
def test_a_full_disk_is_told_before_or_leaves_whole_tars_only(settings, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        assert "1.0 kB are free; make room" in refusal(settings, out)
    plain, calls = cache_writer.CacheTar.write, count(1)

    def full(*args):
        if next(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args)

    with monkeypatch.context() as broken:
        broken.setattr(cache_writer.CacheTar, "write", full)
        with pytest.raises(OSError, match="No space left"):
            make_cache("train_c", settings, out)
    assert len(list(out.glob("*.tar"))) == 1
    assert not list(out.glob(".*.part"))
    assert content(make_cache("train_c", settings, out)) == content(
        make_cache("train_c", settings, tmp_path / "whole")
    )
