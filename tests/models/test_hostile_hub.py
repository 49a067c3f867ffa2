"""A hostile hub or mirror, and a hostile user who can write to the folder of downloads."""

import hashlib
import os
import re
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from families.common import hub as hub_client
from families.common import known_hashes
from families.common.hub import DownloadError, RemoteFile, fetch, list_files, look_up
from families.common.known_hashes import RECORDED
from families.common.weight_source import local_weights, wanted
from models.download import main
from tests.models.test_download import content
from tests.models.test_download import hub as hub
from warpcore.errors import UserError

pytestmark = pytest.mark.integration

PLACE = ("owner/name", "model.safetensors")


def talk_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HF_ENDPOINT does, which the library reads when it is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    ours = template.replace(constants.ENDPOINT, endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", ours)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)


@pytest.fixture
def served(hub, monkeypatch):
    """The hub with one file, as this process talks to it."""
    talk_to(hub.endpoint, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    monkeypatch.setattr(hub_client, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(hub_client, "ATTEMPTS", 2)
    hub.put(*PLACE, content(0))
    return hub


def announce(hub, etag: str) -> RemoteFile:
    hub.hashes["/owner/name/resolve/main/model.safetensors"] = etag
    return look_up(*PLACE)


@pytest.mark.parametrize(
    "url", ["http://example.invalid/x", "ftp://example.invalid/x", "http://10.0.0.1/x", "file:///x"]
)
@pytest.mark.parametrize("by", ["location", "redirect"])
def test_nothing_is_fetched_without_https_whoever_sends_us_there(served, tmp_path, url, by):
    setattr(served, by, url)
    with pytest.raises(DownloadError, match=r"is not https|Unsupported protocol|unsupported protocol"):
        fetch(look_up(*PLACE), tmp_path, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


def test_an_endpoint_without_https_is_refused_before_anything_is_asked(served, monkeypatch):
    talk_to("http://mirror.invalid", monkeypatch)
    for ask in (lambda: look_up(*PLACE), lambda: list_files("owner/name")):
        with pytest.raises(DownloadError, match=r"http://mirror\.invalid is not https.*set HF_ENDPOINT"):
            ask()


def test_a_hub_elsewhere_can_not_send_us_to_this_machine(monkeypatch):
    talk_to("https://hub.invalid", monkeypatch)
    hub_client.check_encrypted("https://elsewhere.invalid/x")
    with pytest.raises(DownloadError, match="not https"):
        hub_client.check_encrypted("http://127.0.0.1:80/x")


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_what_lies_in_place_of_the_partial_file_is_not_written_to(served, tmp_path, kind):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    file = look_up(*PLACE)
    partial = tmp_path / f".model.safetensors.{file.etag[:16]}.part"
    {"link": lambda: partial.symlink_to(victim), "pipe": lambda: os.mkfifo(partial), "folder": partial.mkdir}[kind]()
    with pytest.raises(UserError, match=r"\.part is not a regular file.*remove it"):
        fetch(file, tmp_path, tmp_path)
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("name", [RECORDED, ".owner--name.lock"])
def test_a_link_in_place_of_a_list_or_a_lock_is_not_written_through(served, tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a link"):
        local_weights(Path("owner/name"), "autoencoder", tmp_path / "models")
    assert victim.read_bytes() == b"mine"


def test_a_host_that_sends_without_end_fills_no_disk(served, tmp_path):
    served.endless = True
    with pytest.raises(DownloadError, match="more than the 3000 bytes that the hub announced"):
        fetch(look_up(*PLACE), tmp_path, tmp_path)
    assert all(path.stat().st_size <= 3000 for path in tmp_path.iterdir())


def test_a_trickle_is_given_up(served, tmp_path, monkeypatch):
    served.trickles = True
    monkeypatch.setattr(hub_client, "SLOW_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"connection lost \(no more than \d+ bytes in 0\.2 seconds\)"):
        fetch(look_up(*PLACE), tmp_path, tmp_path)
    assert time.monotonic() - started < 5


def test_a_stall_and_a_host_without_parts_are_got_over(served, tmp_path):
    served.stall_at, served.ignores_ranges = 2000, True
    assert fetch(look_up(*PLACE), tmp_path, tmp_path).read_bytes() == content(0)
    assert served.requests == [("model.safetensors", 0)] * 2


def test_a_partial_file_of_other_or_more_bytes_is_not_completed(served, tmp_path):
    file = look_up(*PLACE)
    partial = tmp_path / f".model.safetensors.{file.etag[:16]}.part"
    partial.write_bytes(b"x" * 1000)
    with pytest.raises(DownloadError, match=r"arrived damaged .* and was deleted"):
        fetch(file, tmp_path, tmp_path)
    partial.write_bytes(b"x" * 5000)
    assert fetch(file, tmp_path, tmp_path).read_bytes() == content(0)


def test_small_files_are_checked_by_the_name_that_git_gives_them(served, tmp_path):
    right = hashlib.sha1(b"blob 3000\0" + content(0)).hexdigest()
    with pytest.raises(DownloadError, match=rf"git names it {right} instead of 0000"):
        fetch(announce(served, "0" * 40), tmp_path, tmp_path)
    assert fetch(announce(served, right), tmp_path, tmp_path).read_bytes() == content(0)


def test_without_a_known_hash_the_first_download_is_recorded_and_another_one_refused(served, tmp_path):
    first = hashlib.sha256(content(0)).hexdigest()
    path = fetch(announce(served, "version-1"), tmp_path, tmp_path)
    assert (tmp_path / RECORDED).read_text() == f"{first}  owner/name/model.safetensors\n"
    served.put(*PLACE, content(1))
    path.unlink()
    other = hashlib.sha256(content(1)).hexdigest()
    for etag in ("version-2", hashlib.sha1(b"blob 3000\0" + content(1)).hexdigest()):
        with pytest.raises(DownloadError, match=rf"SHA-256 {other} instead of {first} in \S+{re.escape(RECORDED)}"):
            fetch(announce(served, etag), tmp_path, tmp_path)
    with pytest.raises(DownloadError, match=rf"SHA-256 {other} on the hub; known is {first}, from \S+sha256sums"):
        fetch(announce(served, other), tmp_path, tmp_path)
    assert not path.exists()
    (tmp_path / RECORDED).unlink()
    assert fetch(announce(served, "version-2"), tmp_path, tmp_path).read_bytes() == content(1)


def test_a_table_takes_pinned_hashes(served, tmp_path, monkeypatch):
    table = tmp_path / "SHA256SUMS"
    table.write_text(f"# mine\n{'0' * 64}  owner/name/model.safetensors\n")
    monkeypatch.setattr(known_hashes, "PINNED", table)
    with pytest.raises(DownloadError, match="instead of 0000"):
        fetch(announce(served, "no hash"), tmp_path, tmp_path)


def test_the_tool_says_where_no_hash_is_known(served, tmp_path, capsys):
    served.put("dome272/stable-cascade", "fernando.tar", content(2))
    served.hashes["/dome272/stable-cascade/resolve/main/fernando.tar"] = "version-1"
    assert main(["example-dataset", "--folder", str(tmp_path)]) == 0
    assert (
        "fernando.tar: complete, size is right, no hash known; the present one is recorded" in capsys.readouterr().out
    )


def test_of_a_repository_with_code_and_pickles_only_configs_and_safetensors_arrive(served, tmp_path):
    evil = "import pathlib; pathlib.Path('ran').touch()"
    for path in ("modeling.py", "pytorch_model.bin", "x.pkl", ".downloaded.json", "setup.sh", "config.json"):
        served.put("owner/name", path, evil.encode())
    folder = local_weights(Path("owner/name"), "autoencoder", tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", ".downloaded.json"}
    assert "import" not in (folder / ".downloaded.json").read_text()


@pytest.mark.parametrize("path", ["a/../../b.json", "/b.json", "a\0.json"])
def test_a_listing_that_leads_out_is_refused(path):
    with pytest.raises(DownloadError, match="outside of its folder"):
        list(wanted({"model.safetensors": 1, path: 1}, "", "owner/name"))


def test_a_listing_without_end_is_refused(served, monkeypatch):
    monkeypatch.setattr(hub_client, "MAX_FILES", 2)
    for number in range(3):
        served.put("owner/name", f"{number}.json", b"{}")
    with pytest.raises(DownloadError, match="more than 2 files"):
        list_files("owner/name")
