"""The run page: what it says of runs, whom it answers to, and that it comes through whatever lies in their folders."""

import errno
import http.client
import json
import os
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.tools.made_up_runs import lines, make_run
from tools.run_places import LocalRuns
from tools.run_reader import Runs
from tools.run_server import Server
from tools.runs import export, place_of
from warpcore.errors import UserError
from warpcore.locks import lock_file

HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=alert(1)>'
NOTES = [
    {"update": 0, "time": 1.7e9, "text": "start: python3 train/train_c.py a.yaml", "state": "running",
     "command": "python3 train/train_c.py a.yaml", "folder": "/home/me/my project"},
    {"update": 4, "time": 1.7e9, "text": f"bad sample a.tar/{HOSTILE}: no picture"},
]  # fmt: skip


@contextmanager
def served(folder: Path):
    """The address of a server of these runs."""
    with Server(LocalRuns(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def get(url: str, path: str, method: str = "GET", **headers) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(url.split("/")[2], timeout=30)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def summaries(folder: Path) -> dict[str, dict]:
    return {run.name: run.summary() for run in Runs(LocalRuns(folder)).all()}


def test_the_state_is_that_of_the_last_start(tmp_path):
    said = {
        "finished": (20, ["running", "finished"]), "stopped": (10, ["running", "stopped"]),
        "failed": (10, ["running", "stopped", "running", "failed"]), "killed": (10, ["running"]),
        "old": (10, None),
    }  # fmt: skip
    for name, (made, states) in said.items():
        notes = None if states is None else [{"update": 0, "text": "", "state": state} for state in states]
        make_run(tmp_path / name, made, notes=notes)
    going = make_run(tmp_path / "group" / "going", 10, notes=NOTES)
    lock = (going / ".lock").open("w", encoding="utf-8")
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    with lock:
        lock_file(lock, "a run")
        found = summaries(tmp_path)
        assert {name: one["state"] for name, one in found.items()} == {
            "finished": "finished", "stopped": "stopped", "failed": "failed", "killed": "killed", "old": "stopped",
            "group/going": "running",
        }  # fmt: skip
        assert found["group/going"]["left"] == 10 * 4 / 8
        assert (found["old"]["update"], found["old"]["updates"], found["old"]["bad"]) == (10, 20, 3)
    assert summaries(tmp_path)["group/going"]["state"] == "killed"


def test_a_run_is_told_of_with_the_command_that_goes_on(tmp_path):
    make_run(tmp_path / "a", notes=NOTES, note=HOSTILE)
    make_run(tmp_path / "b #1")
    with_notes, without = (run.details() for run in Runs(LocalRuns(tmp_path)).all())
    assert with_notes["command"] == "cd '/home/me/my project' && python3 train/train_c.py a.yaml"
    assert [note["text"] for note in with_notes["notes"]] == [note["text"] for note in NOTES]
    assert with_notes["config"]["note"] == HOSTILE
    assert with_notes["config"]["lr"] == "0.001"
    assert (without["command"], without["config_path"]) == (None, f"'{tmp_path}/b #1/config.yaml'")


def test_one_run_alone_can_be_named_and_what_is_no_folder_is_refused(tmp_path):
    make_run(tmp_path / "a")
    assert list(summaries(tmp_path / "a")) == ["a"]
    with pytest.raises(UserError, match="missing is not a folder of runs"):
        place_of(str(tmp_path / "missing"))


def test_a_folder_that_can_not_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def refuse(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{tmp_path} can't be read: Permission denied"):
        place_of(str(tmp_path))


def test_damaged_files_end_nothing(tmp_path):
    damaged = [b"", b"\xff\0[", b"[" * 10**5, b'{"update": {"updates": []}}\n' * 2, b"7\n"]
    for name in ("metrics.jsonl", "info.json", "notes.jsonl", "config.yaml"):
        for number, content in enumerate(damaged):
            (make_run(tmp_path / f"{name} {number}", samples={1: {"red": 5}}) / name).write_bytes(content)
    for number, content in enumerate([b"", b"no picture", b"\x89PNG\r\n\x1a\n"]):
        (make_run(tmp_path / f"sheet {number}", samples={1: {"red": 5}}) / "samples/00000001.png").write_bytes(content)
    for run in Runs(LocalRuns(tmp_path)).all():
        assert json.dumps([run.summary(), run.details(), run.metrics.curve("loss", True, 10)], allow_nan=False)
        assert run.sheet(1)["cells"] is None or not run.name.startswith("sheet")


def test_links_and_what_is_no_file_are_left_out(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine", encoding="utf-8")
    run = make_run(tmp_path / "runs" / "a", samples={1: {"red": 5}})
    (run / "samples/00000002.png").symlink_to(secret)
    os.mkfifo(run / "samples/00000003.png")
    (tmp_path / "runs" / "again").symlink_to(tmp_path / "runs")
    other = make_run(tmp_path / "runs" / "b", samples={1: {"red": 5}})
    (other / "metrics.jsonl").unlink()
    (other / "metrics.jsonl").symlink_to(run / "metrics.jsonl")
    found = summaries(tmp_path / "runs")
    assert found.keys() == {"a", "b"}
    assert found["a"]["samples"] == [1]
    assert found["b"]["loss"] is None


def test_runs_on_s3_are_read_and_live_while_their_lease_is_renewed(tmp_path, bucket, monkeypatch):
    bucket.upload(make_run(tmp_path / "a", 10, notes=NOTES, samples={1: {"red": 5}}), "runs/a/")
    place = place_of(f"{bucket.url}/runs/")
    place.seconds = 0
    (run,) = Runs(place).all()
    assert run.summary()["state"] == "killed"
    assert run.sheet(1)["cells"][0][0] == "drawn: red"
    name, _, size = run.picture("00000001.png")
    assert place.read(name, 0, size) == (tmp_path / "a/samples/00000001.png").read_bytes()
    assert len(run.metrics.curve("loss", False, 100)["x"]) == 10
    bucket.put("runs/a/lease.json", b"1")
    bucket.put("runs/a/metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines(12)).encode())
    assert (run.summary()["state"], run.summary()["update"]) == ("running", 12)
    monkeypatch.setattr("tools.run_places.LEASE_SECONDS", -1)
    assert run.summary()["state"] == "killed"
    assert run.details()["config_path"] == f"{bucket.url}/runs/a/config.yaml"


@pytest.mark.integration
def test_an_export_over_an_earlier_one_keeps_no_pictures_of_it(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    for name in ("b", "a"):
        make_run(runs / name, samples={1: {"a fox": 9}, 2: {"a fox": 9}})
        (runs / name / "samples/00000002.mp4").write_bytes(b"moves")
    export(place_of(str(runs)), out)
    shutil.rmtree(runs / "a")
    (runs / "b/samples/00000002.mp4").unlink()
    others = [out / "mine.png", out / "picture/mine.png", out / "picture/0/mine.png", out / "picture/mine/1.png"]
    others[-1].parent.mkdir()
    for other in others:
        other.write_bytes(b"mine")
    export(place_of(str(runs)), out)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"index.html"}
    own = {f"picture/0/{number:08d}.png" for number in (1, 2)}
    assert files == own | {str(path.relative_to(out)) for path in others}
    assert not (out / "picture/1").exists()


def test_the_server_answers_this_machine_alone(tmp_path):
    make_run(tmp_path / "a", samples={1: {"red": 5}})
    with served(tmp_path) as url:
        port = url.rstrip("/").rpartition(":")[2]
        status, headers, page = get(url, "/")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert b"<title>Runs</title>" in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert get(url, "/api/runs", Host=f"localhost:{port}")[0] == 200
        for other in ("evil.example", f"evil.example:{port}", "127.0.0.1", "127.0.0.1:1", ""):
            assert get(url, "/api/runs", Host=other)[0] == 403
        assert get(url, "/api/runs", Sec_Fetch_Site="cross-site")[0] == 403
        assert get(url, "/", method="POST")[0] == 501
        status, headers, content = get(url, "/api/runs", method="HEAD")
        assert (status, content) == (200, b"")


@pytest.mark.integration
def test_no_path_leads_out_of_the_runs(tmp_path):
    run = make_run(tmp_path / "runs" / "a", samples={1: {"red": 5}})
    (tmp_path / "runs" / "00000001.png").write_bytes(b"mine")
    with served(tmp_path / "runs") as url:
        status, headers, content = get(url, "/picture/0/00000001.png")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert content == (run / "samples/00000001.png").read_bytes()
        for path in (
            "/picture/0/../../00000001.png", "/picture/0/..%2f..%2f00000001.png", "/picture/0/%2e%2e/config.yaml",
            "/picture/0/config.yaml", "/picture/1/00000001.png", "/picture/x/00000001.png", "/../pyproject.toml",
            "/__init__.py", "//etc/passwd", "/api/0/sheet/2", "/api/0/sheet/-1", "/api/0/curve",
            "/api/0/curve?metric=a&start=nan", "/api/0/curve?metric=a&buckets=9e9", "/picture/0/00000001.png/x",
            "x://[",
        ):  # fmt: skip
            assert get(url, path)[0] in (400, 404), path
        (run / "samples/00000001.png").unlink()
        assert get(url, "/picture/0/00000001.png")[0] == 404
        assert get(url, "/api/0/curve?metric=loss&buckets=5")[0] == 200


@pytest.mark.integration
def test_a_file_that_gets_shorter_while_it_is_sent_ends_the_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(LocalRuns, "seconds", 1e6)  # the page knows it as it was
    run = make_run(tmp_path / "a", samples={1: {"red": 5}})
    with served(tmp_path) as url:
        get(url, "/api/runs")
        os.truncate(run / "samples/00000001.png", 10)
        with pytest.raises(http.client.IncompleteRead):
            get(url, "/picture/0/00000001.png")
