"""models/download.py, as people run it, against a small local server that speaks the hub's part of HTTP."""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from families.common.hub import DownloadError, RemoteFile, check_space, expected_sha256, fetch
from families.common.known_hashes import PINNED
from models.download import COSMOS, DIT, LICENCES, SETS, STABLE_DIFFUSION, choose, folder_of

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).parents[2] / "models" / "download.py"
NAMES = ["effnet_encoder.safetensors", "previewer.safetensors", "stage_a.safetensors"]


class Hub:
    """Serves `files` (path after the host -> content) as the hub does: a redirect to another host with the bytes."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.hashes: dict[str, str] = {}  # announced instead of the true ones
        self.requests: list[tuple[str, int]] = []  # file and first byte of every GET
        self.tokens: dict[str, set[str | None]] = {"HEAD": set(), "GET": set()}
        self.break_at: int | None = None  # once: close the connection after so many bytes
        self.stall_at: int | None = None  # once: send so many bytes, then nothing
        self.location: str | None = None  # where the hub sends us to for the bytes
        self.redirect: str | None = None  # where the host of the bytes sends us to
        self.endless = self.trickles = self.ignores_ranges = False
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.bytes_host = [f"http://127.0.0.1:{server.server_port}" for server in self.servers]
        for server in self.servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, repository: str, path: str, content: bytes):
        self.files[f"/{repository}/resolve/main/{path}"] = content

    def close(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, status: int, headers: dict[str, object]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()

    def do_HEAD(self):
        self.hub.tokens["HEAD"].add(self.headers.get("Authorization"))
        content = self.hub.files.get(self.path)
        if content is None:
            self.answer(404, {"X-Error-Code": "EntryNotFound", "Content-Length": 0})
            return
        etag = self.hub.hashes.get(self.path, hashlib.sha256(content).hexdigest())
        headers = {"X-Repo-Commit": "0" * 40, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": len(content)}
        location = self.hub.location or f"{self.hub.bytes_host}{self.path}"
        self.answer(302, {**headers, "Location": location, "Content-Length": 0})

    def list_files(self, tree: str) -> None:
        """Answers with the files of `/OWNER/NAME/tree/main/FOLDER`."""
        place = tree.replace("/tree/main", "/resolve/main", 1).rstrip("/") + "/"
        repository = place.partition("/resolve/main/")[0] + "/resolve/main/"
        found = {
            path.removeprefix(repository): content
            for path, content in self.hub.files.items()
            if path.startswith(place)
        }
        if not found:
            self.answer(404, {"X-Error-Code": "RepoNotFound", "Content-Length": 0})
            return
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40} for path, content in found.items()
        ]
        body = json.dumps(entries).encode()
        self.answer(200, {"Content-Type": "application/json", "Content-Length": len(body)})
        self.wfile.write(body)

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            self.list_files(self.path.removeprefix("/api/models").partition("?")[0])
            return
        content = self.hub.files.get(self.path)
        if content is None:
            self.answer(404, {"Content-Length": 0})
            return
        self.hub.tokens["GET"].add(self.headers.get("Authorization"))
        if self.hub.redirect:
            self.answer(302, {"Location": self.hub.redirect, "Content-Length": 0})
            return
        asked = not self.hub.ignores_ranges and re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        self.hub.requests.append((Path(self.path).name, first))
        place = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"} if asked else {}
        length = {} if self.hub.endless else {"Content-Length": len(content) - first}
        self.answer(206 if asked else 200, {**length, **place})
        if self.hub.endless or self.hub.trickles:
            self.close_connection = True
            with contextlib.suppress(OSError):  # they hang up
                while True:
                    self.wfile.write(b"x" * (1 if self.hub.trickles else 1 << 16))
                    time.sleep(0.02 if self.hub.trickles else 0)
            return
        break_at, self.hub.break_at = self.hub.break_at, None
        stall_at, self.hub.stall_at = self.hub.stall_at, None
        self.wfile.write(content[first : break_at or stall_at])
        self.wfile.flush()
        if break_at:
            self.close_connection = True
        if stall_at:
            time.sleep(30)


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.close()


def content(seed: int, size: int = 3000) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def start(hub: Hub | str, folder: Path, *words: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {
        "HF_ENDPOINT": getattr(hub, "endpoint", hub),
        "HF_HOME": str(folder / "hf_home"),
        "HF_TOKEN": "hf_secret",
    }
    command = [sys.executable, str(SCRIPT), *words, "--folder", str(folder / "models")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(hub: Hub | str, folder: Path, *words: str) -> tuple[int, str, str]:
    process = start(hub, folder, *words)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def downloaded(folder: Path) -> dict[str, bytes]:
    """What lies there, without the recorded hashes."""
    return {path.name: path.read_bytes() for path in (folder / "models").iterdir() if path.name != ".sha256sums"}


@pytest.mark.parametrize(
    ("words", "repository", "paths"),
    [
        (["essential"], "stabilityai/stable-cascade", NAMES),
        (
            ["big-small", "bfloat16"],
            "stabilityai/stable-cascade",
            ["stage_b_bf16.safetensors", "stage_c_lite_bf16.safetensors"],
        ),
        (["small-big", "fp32"], "stabilityai/stable-cascade", ["stage_b_lite.safetensors", "stage_c.safetensors"]),
        (["example-dataset"], "dome272/stable-cascade", ["fernando.tar"]),
        (
            ["controlnet"],
            "stabilityai/stable-cascade",
            [f"controlnet/{name}.safetensors" for name in ("canny", "inpainting", "super_resolution")],
        ),
    ],
)
def test_a_set_lands_in_the_folder(hub, tmp_path, words, repository, paths):
    for seed, path in enumerate(paths):
        hub.put(repository, path, content(seed))
    assert run(hub, tmp_path, *words, "--dry-run")[0] == 0
    assert not hub.requests
    code, output, errors = run(hub, tmp_path, *words)
    assert code == 0, errors
    assert hub.tokens == {"HEAD": {"Bearer hf_secret"}, "GET": {None}}  # the token is for the hub alone
    assert downloaded(tmp_path) == {Path(path).name: content(seed) for seed, path in enumerate(paths)}
    assert output.count("size and hash are right") == len(paths)


def test_what_is_already_there_is_checked_and_not_fetched_again(hub, tmp_path):
    for seed, name in enumerate(NAMES):
        hub.put("stabilityai/stable-cascade", name, content(seed))
    assert run(hub, tmp_path, "essential")[0] == 0
    hub.requests.clear()
    assert run(hub, tmp_path, "essential")[0] == 0
    assert hub.requests == []
    path = tmp_path / "models" / NAMES[1]
    path.write_bytes(content(9))
    code, _, errors = run(hub, tmp_path, "essential")
    assert code == 2
    assert re.search(r"previewer\.safetensors is not the hub's \(SHA-256 .*move or delete it", errors)
    assert path.read_bytes() == content(9)


def test_a_killed_download_goes_on_where_it_stopped(hub, tmp_path):
    big = content(0, 25_000_000)
    hub.put("dome272/stable-cascade", "fernando.tar", big)
    hub.stall_at = 22_000_000
    process = start(hub, tmp_path, "example-dataset")
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size >= 20_000_000 for path in tmp_path.glob("models/.fernando.tar.*.part")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, _, errors = run(hub, tmp_path, "example-dataset")
    assert code == 0, errors
    assert downloaded(tmp_path) == {"fernando.tar": big}
    assert [first >= 20_000_000 for _, first in hub.requests] == [False, True]


def test_a_broken_connection_is_taken_up_again(hub, tmp_path):
    big = content(0, 25_000_000)
    hub.put("dome272/stable-cascade", "fernando.tar", big)
    hub.break_at = 22_000_000
    code, _, errors = run(hub, tmp_path, "example-dataset")
    assert code == 0, errors
    assert downloaded(tmp_path) == {"fernando.tar": big}
    assert [name for name, _ in hub.requests] == ["fernando.tar"] * 2


def test_damaged_bytes_never_get_the_name_of_the_file(hub, tmp_path):
    hub.put("dome272/stable-cascade", "fernando.tar", content(0))
    hub.hashes["/dome272/stable-cascade/resolve/main/fernando.tar"] = hashlib.sha256(content(1)).hexdigest()
    code, _, errors = run(hub, tmp_path, "example-dataset")
    assert code == 2
    assert "fernando.tar arrived damaged (SHA-256" in errors
    assert downloaded(tmp_path) == {}


def test_mistakes_and_missing_networks_are_named(hub, tmp_path):
    cases = [
        (hub, ["huge-big"], r"'huge-big' is unknown; write any of sd15, .*essential, big-big, .*bfloat16"),
        (hub, ["float32"], r"nothing to download is named; write any of sd15"),
        (hub, ["big-big", "bf16", "fp32"], r"write one of them"),
        (hub, ["essential"], r"has no effnet_encoder\.safetensors in stabilityai/stable-cascade"),
        ("http://127.0.0.1:9", ["essential"], r"can't reach 127\.0\.0\.1:9 .*set HF_ENDPOINT to a mirror"),
    ]
    for endpoint, words, message in cases:
        code, _, errors = run(endpoint, tmp_path, *words)
        assert code == 2
        assert re.search(message, errors.replace("\n", " ")), errors
        assert "Traceback" not in errors
    assert not (tmp_path / "models").exists()


def test_a_file_of_stable_diffusion_is_the_published_one(hub, tmp_path):
    place = ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors")
    hub.put(*place, content(0))
    code, _, errors = run(hub, tmp_path, "sdxl")
    assert code == 2
    assert re.search(
        r"sd_xl_base_1\.0\.safetensors of stabilityai/.* has 3000 bytes and SHA-256 .* known is 31e35c.*SHA256SUMS",
        errors,
    )
    assert not hub.requests
    published = "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b"
    assert expected_sha256(RemoteFile(*place, "https://nowhere", 1, published), tmp_path) == published
    assert expected_sha256(RemoteFile(*place, "https://nowhere", 1, "no hash"), tmp_path) == published


def test_files_without_a_pinned_hash_are_listed_in_the_docs():
    pinned = PINNED.read_text(encoding="utf-8")
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    for words in [[*STABLE_DIFFUSION], [*COSMOS], [*DIT], [*SETS], [*SETS, "float32"]]:
        for repository, path in choose(words):
            assert (f"  {repository}/{path}\n" in pinned) != (f"`{path}`" in page), path


def test_every_set_has_a_licence_in_one_word():
    for words in ([*SETS], [*STABLE_DIFFUSION], [*COSMOS], [*DIT]):
        for repository, _ in choose(words):
            assert re.fullmatch(r"\S+", LICENCES[repository])


def test_files_of_cosmos_which_have_equal_names_keep_their_folders(tmp_path):
    files = [RemoteFile(*place, "https://nowhere", 1, "") for place in choose(["cosmos-2b", "cosmos-14b", "sd15"])]
    found = [(folder_of(file, tmp_path) / file.name).relative_to(tmp_path).as_posix() for file in files]
    assert found == [
        "v1-5-pruned-emaonly.safetensors",
        *(f"Cosmos-Predict2-{size}-Text2Image/{path}" for size in ("2B", "14B")
          for path in ("model.pt", "tokenizer/tokenizer.pth")),
    ]  # fmt: skip


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    file = RemoteFile("a/b", "fernando.tar", "http://nowhere", 10**18, "0" * 64)
    with pytest.raises(DownloadError, match=r"1000000000\.0 GB are to be downloaded, but .* GB free"):
        check_space([file], tmp_path / "models")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("families.common.hub._receive", full)
    with pytest.raises(DownloadError, match=r"the disk of .* is full; free some space"):
        fetch(file, tmp_path, tmp_path)
