"""Credentials are in nothing that a run prints or writes."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.warpcore.runs import TINY, tiny_settings, write_shard
from tests.warpcore.tiny import TinyConfig
from warpcore.config import ConfigError, make_config
from warpcore.data.shards import resolve_sources
from warpcore.data.storage_protocol import ChangedShardError
from warpcore.errors import UserError
from warpcore.pictures import read_metadata, save_png
from warpcore.redaction import redact, redact_output
from warpcore.text import brief, shortened
from warpcore.tracking import make_tracker

SECRET = "wJalrXUtnFEMI/K7MDENG"
URLS = [
    f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/set",
    f"https://user:{SECRET}@host/bucket",
    f"https://user:{SECRET}@127.0.0.1:9000/bucket",
    f"https://{SECRET.replace('/', '%2F')}@host/bucket",
    f"https://bucket.host/x.tar?X-Amz-Credential=k%2F1&X-Amz-Signature={SECRET}&X-Amz-Expires=1",
    f"https://cdn.host/x?Policy=a&Signature={SECRET}&Key-Pair-Id=b",
    f"https://blob.host/x?se=1&sig={SECRET}",
    f"https://host/x?token={SECRET}",
]


def holds_secret(text: str) -> bool:
    return SECRET in text or SECRET.replace("/", "%2F") in text


@pytest.mark.parametrize("url", URLS)
def test_urls_lose_their_credentials_and_keep_their_place(url):
    assert not holds_secret(redact(f"can't read '{url}': no"))
    assert redact(f"can't read '{url}': no").endswith("': no")
    assert url.split("://")[0] + "://" in redact(url)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/a@b/x.tar", "http://127.0.0.1:9000/a@b", "http://host:80 and a@b", "file:///data/a@b",
        "key: value, lr=1e-4, token: 3", "https://host/x?page=2&keys=3", "a picture at http://host/x, mail me@host",
    ],
)  # fmt: skip
def test_other_text_stays_as_it_is(text):
    assert redact(text) == text


def test_tokens_and_values_of_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("HF_TOKEN", "short")
    assert redact("key 0123456789abcdef; a short text") == "key ***; a short text"
    assert redact("hf_" + "a" * 34 + " AKIAIOSFODNN7EXAMPLE") == "*** ***"


def test_long_text_is_redacted_quickly():
    for text in ("a" * 10**5, "s3://" * 10**4, "a:" * 10**4, "?sig=" * 10**4, "http://a:" * 10**4):
        started = time.process_time()
        redact(text)
        assert time.process_time() - started < 2


@pytest.mark.parametrize("url", URLS)
def test_a_config_takes_no_credentials_and_its_error_shows_none(url, tmp_path):
    for value in (url, f"a.png;{url}", [url], {"path": url}, [{"path": url + "x" * 500, "weight": 2}]):
        with pytest.raises(ConfigError, match=r"webdataset_path: found .* written without credentials") as error:
            make_config(TinyConfig, tiny_settings(tmp_path, Path("x")) | {"webdataset_path": value})
        assert not holds_secret(str(error.value))
    (tmp_path / "sets.yml").write_text(yaml.safe_dump([url]))
    with pytest.raises(UserError, match="holds credentials") as error:
        resolve_sources(str(tmp_path / "sets.yml"))
    assert not holds_secret(str(error.value))


@pytest.mark.parametrize("url", URLS)
def test_a_picture_says_none_of_what_it_was_made_of(url, tmp_path):
    save_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), {"settings": json.dumps({"prompts": [f"a;{url}"]})})
    said = read_metadata(tmp_path / "a.png")["settings"]
    assert not holds_secret(said)
    assert json.loads(said)["prompts"][0].startswith("a;")


def test_what_is_cut_off_is_redacted_first():
    long = f"https://user:{SECRET}{'x' * 300}@host/"
    assert not holds_secret(shortened(long) + brief(long) + brief([{"a": long}]))


def test_errors_logs_and_trackers_show_none(tmp_path, capsys):
    error = pickle.loads(pickle.dumps(ChangedShardError(URLS[0])))
    assert not holds_secret(str(error))
    factory, hook = logging.getLogRecordFactory(), sys.excepthook
    try:
        redact_output()
        records: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logger = logging.getLogger("test_redaction")
        logger.addHandler(handler)
        logger.warning("%s failed (%r)", URLS[1], error)
        sys.excepthook(OSError, OSError(URLS[1]), None)
    finally:
        logging.setLogRecordFactory(factory)
        sys.excepthook = hook
    assert len(records) == 1
    told = records[0] + capsys.readouterr().err
    assert "***@host" in told
    assert not holds_secret(told)
    tracker = make_tracker(
        wandb_project=None, wandb_entity=None, tensorboard=True, folder=tmp_path, run_id="1", config={"a": URLS[1]}
    )
    tracker.alert("data", URLS[4])
    tracker.close()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"***@host" in written
    assert SECRET.encode() not in written


@pytest.mark.integration
@pytest.mark.parametrize("is_there", [pytest.param(True, marks=pytest.mark.slow), False])
def test_nothing_that_a_run_prints_or_writes_holds_a_credential(bucket, tmp_path, monkeypatch, is_there):
    write_shard(tmp_path / "data/0.tar", 10)
    url = bucket.upload(tmp_path / "data", "set/")
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "PassOfTheBucket1",
        "AWS_SESSION_TOKEN": "TokenOfTheBucket2",
        "HF_TOKEN": "hf_OfTheHub3OfTheHub3OfTheHub3",
        "WANDB_API_KEY": "f00dBeef4" * 5,
    }
    at = bucket.endpoint.removeprefix("http://") if is_there else "127.0.0.1:9"
    environment = secrets | {
        "AWS_ENDPOINT_URL": f"http://user:PassOfTheEndpoint5@{at}",
        "AWS_MAX_ATTEMPTS": "1",
        "WANDB_MODE": "offline",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    changes = {"updates": 2, "save_every": 2, "tensorboard": True, "wandb_project": "test", "num_workers": 1}
    settings = tiny_settings(tmp_path / "run", url, **changes)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    done = subprocess.run(
        [sys.executable, str(TINY), str(tmp_path / "config.yaml")],
        capture_output=True, text=True, timeout=300, env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == (0 if is_there else 2), done.stderr
    assert is_there or "http://***@127.0.0.1:9" in done.stderr
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5 or not is_there
    for secret in [*secrets.values(), "PassOfTheEndpoint5"]:
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in content for content in written), secret
