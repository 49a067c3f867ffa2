"""Files of the Hugging Face hub: looked up, downloaded where an earlier attempt stopped, and checked.

HF_ENDPOINT chooses a mirror, HF_TOKEN or `hf auth login` an account. Everything goes by https, redirects too; plain
http is for a mirror on this machine.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import BinaryIO
from urllib.parse import urljoin, urlsplit

from families.common.known_hashes import PINNED, RECORDED, known_hash, record_hash
from warpcore.errors import UserError
from warpcore.files import open_plain, open_to_read
from warpcore.progress_bar import ProgressBar

BLOCK_BYTES = 1 << 24
LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_FILES = 10_000
"""Of a repository: more than any that is read here has; a listing may have no end."""
ATTEMPTS = 5
"""Connections in a row that brought less than PROGRESS_BYTES, after which a download ends."""
PROGRESS_BYTES = 1 << 20
SLOW_SECONDS, SLOW_BYTES = 60, 64 << 10
"""A connection that brings less than this in that time is given up for another one."""
PAUSE_SECONDS = 1
"""Before the second connection; doubled before each further one."""


class DownloadError(UserError):
    """No network, no such file, no permission, no room, or other bytes than the hub announced or than are known."""


@dataclass(frozen=True)
class RemoteFile:
    repository: str
    path: str  # in the repository
    url: str  # where the bytes are; the hub may send us to another host
    size_bytes: int
    etag: str  # SHA-256 of the hub's large files, git's name of small ones, anything or "" from a mirror
    local_name: str = ""  # what it is called here; by default as in the repository

    @property
    def name(self) -> str:
        return self.local_name or Path(self.path).name

    @property
    def place(self) -> str:
        return f"{self.repository}/{self.path}"

    @property
    def sha256(self) -> str | None:
        return self.etag if re.fullmatch("[0-9a-f]{64}", self.etag) else None

    @property
    def git_blob(self) -> str | None:
        return self.etag if re.fullmatch("[0-9a-f]{40}", self.etag) else None


def look_up(repository: str, path: str) -> RemoteFile:
    """Asks the hub for a file's size, hash and place.

    Raises:
        DownloadError: no network, no such file, or no permission.
    """
    hub, errors = _library()
    url = hub.hf_hub_url(repository, path)
    try:
        found = hub.get_hf_file_metadata(url, token=hub.get_token())
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository} wants its licence accepted: do so at {_page(url)}, then run `hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise DownloadError(f"{urlsplit(url).netloc} has no {path} in {repository}; {error}") from error
    except (errors.HTTPError, OSError) as error:
        raise DownloadError(
            f"can't reach {urlsplit(url).netloc} ({error}); check the network, or set HF_ENDPOINT to a mirror"
        ) from error
    if found.size is None or found.size < 0:
        raise DownloadError(f"{urlsplit(url).netloc} names no size for {path}; is HF_ENDPOINT a mirror?")
    return RemoteFile(repository, path, urljoin(url, found.location), found.size, found.etag or "")


def look_up_elsewhere(repository: str, path: str, url: str) -> RemoteFile:
    """Asks the host of a file that is not on the hub for its size. It says no hash that is checked.

    Args:
        repository, path: what the file is called in `models/SHA256SUMS`, and in the record of its hash.

    Raises:
        DownloadError: no network, or no such file.
    """
    hub, errors = _library()
    host = urlsplit(url).netloc
    try:
        answer = hub.utils.get_session().head(url, headers={"Accept-Encoding": "identity"}, follow_redirects=True)
        answer.raise_for_status()
    except (errors.HTTPError, OSError) as error:
        raise DownloadError(
            f"can't get {url} ({error}); check the network, and whether {host} still has it"
        ) from error
    size = answer.headers.get("Content-Length", "")
    if not re.fullmatch("[0-9]{1,18}", size):
        raise DownloadError(f"{host} names no size for {path}")
    etag = re.sub("[^0-9A-Za-z-]", "", answer.headers.get("ETag", ""))
    return RemoteFile(repository, path, str(answer.url), int(size), f"of its host: {etag}" if etag else "")


def list_files(repository: str, folder: str = "") -> dict[str, int]:
    """The files below a folder of a repository, by path in it, with their sizes in bytes.

    Raises:
        DownloadError: no network, no such repository or folder, or no permission.
    """
    hub, errors = _library()
    try:
        listing = hub.HfApi().list_repo_tree(repository, folder or None, recursive=True)
        found = list(islice(listing, MAX_FILES + 1))
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{repository} wants its licence accepted: do so at {hub.constants.ENDPOINT}/{repository}, then run "
            "`hf auth login`"
        ) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise DownloadError(
            f"{hub.constants.ENDPOINT} has no {'/'.join(filter(None, (repository, folder)))}"
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise DownloadError(
            f"can't reach {hub.constants.ENDPOINT} ({error}); check the network, or set HF_ENDPOINT to a mirror"
        ) from error
    if len(found) > MAX_FILES:
        raise DownloadError(f"{repository} holds more than {MAX_FILES} files; name one of its folders")
    return {file.path: file.size for file in found if isinstance(file, hub.hf_api.RepoFile)}


def fetch(file: RemoteFile, folder: Path, root: Path) -> Path:
    """Downloads a file, from where an earlier attempt stopped, and checks it before it gets its name.

    Args:
        folder: where the file lands.
        root: where downloads land, with the hashes that were recorded; see `known_hashes`.

    Raises:
        DownloadError: the connection broke, the disk is full, or the bytes aren't those that the hub announced or that
            are known.
    """
    expected_sha256(file, root)
    # The name holds the hash, so that versions never mix.
    target, partial = folder / file.name, _partial(file, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _refuse_special(partial)
        with open_plain(partial, "ab") as opened:
            if not file.etag or opened.tell() > file.size_bytes:
                _empty(opened)
            _receive(file, opened)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk of {folder} is full; free some space and run the same command") from error
        raise DownloadError(f"{file.name}: {error}; run the same command to go on from here") from error
    problem = difference(partial, file, root)
    if problem:
        partial.unlink()
        raise DownloadError(f"{file.name} arrived damaged ({problem}) and was deleted; run the same command again")
    record_hash(file.place, file.sha256 or _sha256(partial), root)
    os.replace(partial, target)
    return target


def expected_sha256(file: RemoteFile, root: Path) -> str | None:
    """The SHA-256 that a file has to have: the pinned or recorded one, or else the one that the hub announces.

    Raises:
        DownloadError: the hub announces another one than is known.
    """
    known = known_hash(file.place, root)
    if known is None:
        return file.sha256
    sha256, listed = known
    if file.sha256 not in (None, sha256):
        raise DownloadError(
            f"{file.name} of {file.repository} has {file.size_bytes} bytes and SHA-256 {file.sha256} on the hub; "
            f"known is {sha256}, from {listed}. Check HF_ENDPOINT; if its authors have changed the file, and you "
            "trust it, write the new hash there"
        )
    return sha256


def difference(path: Path, file: RemoteFile, root: Path) -> str | None:
    """How a local file differs from the hub's in size or hash; None where it doesn't, as far as a hash is known."""
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        return f"{size_bytes} bytes instead of {file.size_bytes}"
    if expected := expected_sha256(file, root):
        found = _sha256(path)
        listed = "" if expected == file.sha256 else f" in {root / RECORDED} or {PINNED}"
        return None if found == expected else f"SHA-256 {found} instead of {expected}{listed}"
    if file.git_blob:
        found = _digest(path, hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False))
        return None if found == file.git_blob else f"git names it {found} instead of {file.git_blob}"
    return None


def _sha256(path: Path) -> str:
    return _digest(path, hashlib.sha256())


def _digest(path: Path, digest: "hashlib._Hash") -> str:
    with open_to_read(path) as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _receive(file: RemoteFile, opened: BinaryIO) -> None:
    """Appends what is missing of a file; a connection that breaks off or stalls is followed by another one."""
    _, errors = _library()
    failures = 0
    with ProgressBar(desc=file.name, total=file.size_bytes, unit="B", unit_scale=True, mininterval=1) as progress:
        while (before := opened.tell()) < file.size_bytes:
            fault: object = "the connection ended early"
            try:
                _append(file, opened, progress)
            except (errors.HTTPError, _SlowError) as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status is not None and status < 500 and status not in (408, 429):
                    raise DownloadError(f"{file.name}: {error}") from error
                fault = error
            opened.flush()
            failures = 0 if opened.tell() - before >= PROGRESS_BYTES else failures + 1
            if opened.tell() < file.size_bytes:
                if failures == ATTEMPTS:
                    raise DownloadError(f"{file.name}: connection lost ({fault}); run the same command to go on")
                time.sleep(PAUSE_SECONDS * 2**failures)


def _append(file: RemoteFile, opened: BinaryIO, progress: ProgressBar) -> None:
    """One request for what is missing.

    Raises:
        DownloadError: the host sends more than the hub announced.
    """
    hub, _ = _library()
    headers = hub.utils.build_hf_headers(token=hub.get_token()) | {"Accept-Encoding": "identity"}
    if urlsplit(file.url).netloc != urlsplit(hub.hf_hub_url(file.repository, file.path)).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for the host it sends us to
    start = opened.tell()
    if start:
        headers["Range"] = f"bytes={start}-"
    timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
    with hub.utils.get_session().stream("GET", file.url, headers=headers, timeout=timeout) as answer:
        hub.utils.hf_raise_for_status(answer)
        if start and not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            _empty(opened)  # all of it comes once more
        progress.n = opened.tell()
        since, in_window = time.monotonic(), 0
        for block in answer.iter_bytes():
            if opened.tell() + len(block) > file.size_bytes:
                _empty(opened)
                raise DownloadError(
                    f"{file.name}: more than the {file.size_bytes} bytes that the hub announced arrive"
                )
            opened.write(block)
            progress.update(len(block))
            in_window += len(block)
            if time.monotonic() - since > SLOW_SECONDS:
                if in_window < SLOW_BYTES:
                    raise _SlowError(f"no more than {in_window} bytes in {SLOW_SECONDS} seconds")
                since, in_window = time.monotonic(), 0


def _empty(opened: BinaryIO) -> None:
    opened.seek(0)
    opened.truncate()


class _SlowError(Exception):
    """A connection that is not worth waiting for."""


def check_space(files: Sequence[RemoteFile], folder: Path) -> None:
    """Raise DownloadError where a folder's disk lacks room for what is missing of the files."""
    here = [partial.stat().st_size for file in files if (partial := _partial(file, folder)).exists()]
    needed_bytes = sum(file.size_bytes for file in files) - sum(here)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise DownloadError(
            f"{needed_bytes / 1e9:.1f} GB are to be downloaded, but {folder} has {free_bytes / 1e9:.1f} GB free; "
            "free some space, or choose another folder with --folder"
        )


def _partial(file: RemoteFile, folder: Path) -> Path:
    tag = re.sub("[^0-9A-Za-z]", "", file.etag)[:16]
    return folder / f".{file.name}.{tag}.part"


def _refuse_special(path: Path) -> None:
    """Raise DownloadError for a link, a named pipe or a device, which others may have put there."""
    if path.is_symlink() or (path.exists() and not stat.S_ISREG(path.lstat().st_mode)):
        raise DownloadError(f"{path} is not a regular file, so nothing is downloaded into it; remove it")


@cache
def _library() -> tuple[ModuleType, ModuleType]:
    """huggingface_hub and its errors; every request that it makes, after a redirect too, is checked first."""
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils import _http

    def client():
        made = _http.default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = hooks | {"request": [lambda request: check_encrypted(str(request.url)), *hooks["request"]]}
        return made

    hub.set_client_factory(client)
    return hub, errors


def check_encrypted(url: str) -> None:
    """Raise DownloadError for a URL that is not https. Plain http may only go from this machine to itself."""
    from huggingface_hub import constants

    parts, endpoint = urlsplit(url), urlsplit(constants.ENDPOINT)
    if parts.scheme == "https":
        return
    if parts.scheme == "http" and parts.hostname in LOOPBACK and endpoint.hostname in LOOPBACK:
        return
    raise DownloadError(
        f"{parts.scheme}://{parts.hostname} is not https, so anyone on the way could read and change what is sent; "
        "set HF_ENDPOINT to an address that begins with https://"
    )


def _page(url: str) -> str:
    return url.split("/resolve/")[0]
