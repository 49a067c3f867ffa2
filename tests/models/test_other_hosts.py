"""Files that are not on the hub: sizes come from their host, and the first download is recorded."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from families.common.hub import DownloadError, look_up_elsewhere
from families.common.known_hashes import RECORDED
from models import download
from tests.models.test_hostile_hub import talk_to

pytestmark = pytest.mark.integration
NAME, CONTENT = "DiT-XL-2-256x256.pt", bytes(range(256)) * 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        found = self.path == f"/models/{NAME}"
        self.server.tokens.add(self.headers.get("Authorization"))
        self.send_response(200 if found else 404)
        self.send_header("ETag", '"0123-4"')
        self.send_header("Content-Length", str(len(self.server.content) if found else 0))
        self.end_headers()
        if found and with_body:
            self.wfile.write(self.server.content)


@pytest.fixture
def host(monkeypatch):
    """Serves the file as its authors do, on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads, server.content, server.tokens = True, CONTENT, set()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    talk_to("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setitem(download.ELSEWHERE, "facebookresearch/DiT", f"{url}/models/")
    yield server
    server.shutdown()
    server.server_close()


def test_a_published_dit_is_downloaded_once_and_its_hash_recorded(host, tmp_path, capsys):
    for told in ("to download", "here"):
        assert download.main(["dit-256", "--folder", str(tmp_path)]) == 0
        assert told in capsys.readouterr().out
    assert (tmp_path / NAME).read_bytes() == CONTENT
    recorded = (tmp_path / RECORDED).read_text()
    assert recorded == f"{hashlib.sha256(CONTENT).hexdigest()}  facebookresearch/DiT/{NAME}\n"
    assert host.tokens == {None}  # the token is for the hub alone


def test_another_file_under_its_name_is_refused(host, tmp_path, capsys):
    assert download.main(["dit-256", "--folder", str(tmp_path)]) == 0
    (tmp_path / NAME).unlink()
    host.content = CONTENT[::-1]
    with pytest.raises(SystemExit) as ended:
        download.main(["dit-256", "--folder", str(tmp_path)])
    assert ended.value.code == 2
    assert "arrived damaged" in capsys.readouterr().err
    assert not (tmp_path / NAME).exists()


def test_a_host_without_the_file_or_without_https_is_one_clear_error(host, monkeypatch):
    url = download.ELSEWHERE["facebookresearch/DiT"]
    with pytest.raises(DownloadError, match=r"can't get .*absent.pt .*404"):
        look_up_elsewhere("a/b", "absent.pt", f"{url}absent.pt")
    talk_to("https://hub.invalid", monkeypatch)
    with pytest.raises(DownloadError, match="is not https"):
        look_up_elsewhere("a/b", NAME, f"{url}{NAME}")
