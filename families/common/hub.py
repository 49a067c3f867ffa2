"""Files of the Hugging Face hub: looked up, downloaded where an earlier attempt stopped, and checked.

HF_ENDPOINT chooses a mirror, HF_TOKEN or `hf auth login` an account.
"""

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from warpcore.errors import UserError

BLOCK_BYTES = 1 << 24


class DownloadError(UserError):
    """No network, no such file, no permission, no room, or other bytes than the hub announced."""


@dataclass(frozen=True)
class RemoteFile:
    repository: str
    path: str  # in the repository
    url: str  # where the bytes are; the hub may send us to another host
    size_bytes: int
    etag: str  # SHA-256 of the content, for the large files of the hub

    @property
    def name(self) -> str:
        return Path(self.path).name


def look_up(repository: str, path: str) -> RemoteFile:
    """Asks the hub for a file's size, hash and place.

    Raises:
        DownloadError: no network, no such file, or no permission.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

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
    if found.size is None or not found.etag:
        raise DownloadError(f"{urlsplit(url).netloc} names no size and hash for {path}; is HF_ENDPOINT a mirror?")
    return RemoteFile(repository, path, found.location, found.size, found.etag)


def list_files(repository: str, folder: str = "") -> dict[str, int]:
    """The files below a folder of a repository, by path in it, with their sizes in bytes.

    Raises:
        DownloadError: no network, no such repository or folder, or no permission.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    try:
        found = list(hub.HfApi().list_repo_tree(repository, folder or None, recursive=True))
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
    return {file.path: file.size for file in found if isinstance(file, hub.hf_api.RepoFile)}


def fetch(file: RemoteFile, folder: Path) -> Path:
    """Downloads a file, from where an earlier attempt stopped, and checks it before it gets its name.

    Raises:
        DownloadError: the connection broke, the disk is full, or the bytes aren't those that the hub announced.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get

    # The hub's own download starts again after a crash; the name holds the hash so that versions never mix.
    target, partial = folder / file.name, _partial(file, folder)
    headers = hub.utils.build_hf_headers(token=hub.get_token())
    if urlsplit(file.url).netloc != urlsplit(hub.hf_hub_url(file.repository, file.path)).netloc:
        headers.pop("authorization", None)  # the token is for the hub, not for the host it sends us to
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as opened:
            http_get(
                file.url,
                opened,
                resume_size=opened.tell(),
                headers=headers,
                expected_size=file.size_bytes,
                displayed_filename=file.name,
            )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"the disk of {folder} is full; free some space and run the same command") from error
        raise DownloadError(f"{file.name}: {error}; run the same command to go on from here") from error
    except errors.HTTPError as error:
        raise DownloadError(f"{file.name}: connection lost ({error}); run the same command to go on") from error
    problem = difference(partial, file)
    if problem:
        partial.unlink()
        raise DownloadError(f"{file.name} arrived damaged ({problem}) and was deleted; run the same command again")
    os.replace(partial, target)
    return target


def difference(path: Path, file: RemoteFile) -> str | None:
    """How a local file differs from the hub's in size or SHA-256; None where it doesn't."""
    size_bytes = path.stat().st_size
    if size_bytes != file.size_bytes:
        return f"{size_bytes} bytes instead of {file.size_bytes}"
    if not re.fullmatch("[0-9a-f]{64}", file.etag):
        return None  # a small file of git's, whose tag isn't a hash of the content
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            digest.update(block)
    return None if digest.hexdigest() == file.etag else f"SHA-256 {digest.hexdigest()} instead of {file.etag}"


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


def _page(url: str) -> str:
    return url.split("/resolve/")[0]
