"""Downloads the official weights into this folder; an interrupted download goes on where it stopped.

    python3 models/download.py essential big-big bfloat16

essential: what every use case needs (encoder of Stage C's latents, its previewer, Stage A).
big-big, big-small, small-big, small-small: Stage B and Stage C (in this order), the large or the small version.
controlnet: the ControlNets for the large Stage C (canny, inpainting, super_resolution).
example-dataset: fernando.tar, pictures of a dog, for the LoRA example of the training guide.
bfloat16 (default) or float32: the type of Stage B's and C's weights.

HF_ENDPOINT chooses a mirror, HF_TOKEN or `hf auth login` an account. Files are checked against the hub's size and
SHA-256.
"""

import argparse
import errno
import hashlib
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

WEIGHTS, EXAMPLES = "stabilityai/stable-cascade", "dome272/stable-cascade"
VARIANTS = {
    f"{stage_b}-{stage_c}": [
        f"stage_b{'' if stage_b == 'big' else '_lite'}{{dtype}}.safetensors",
        f"stage_c{'' if stage_c == 'big' else '_lite'}{{dtype}}.safetensors",
    ]
    for stage_b in ("big", "small")
    for stage_c in ("big", "small")
}
SETS = {
    "essential": ["effnet_encoder.safetensors", "previewer.safetensors", "stage_a.safetensors"],
    **VARIANTS,
    "controlnet": [f"controlnet/{name}.safetensors" for name in ("canny", "inpainting", "super_resolution")],
    "example-dataset": ["fernando.tar"],
}
DTYPES = {"bfloat16": "_bf16", "bf16": "_bf16", "float32": "", "fp32": ""}
BLOCK_BYTES = 1 << 24


class DownloadError(Exception):
    """Something a person has to know or do; the message says what."""


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


def choose(words: list[str]) -> list[tuple[str, str]]:
    """(repository, path) of each file that the words of the command line name.

    Raises:
        DownloadError: a word is unknown, or none names a set.
    """
    unknown = [word for word in words if word not in SETS and word not in DTYPES]
    if unknown or not any(word in SETS for word in words):
        problem = f"{unknown[0]!r} is unknown" if unknown else "nothing to download is named"
        raise DownloadError(f"{problem}; write any of {', '.join(SETS)}, and at most one of {', '.join(DTYPES)}")
    suffixes = {DTYPES[word] for word in words if word in DTYPES} or {"_bf16"}
    if len(suffixes) > 1:
        raise DownloadError("bfloat16 and float32 are both named; write one of them")
    (suffix,) = suffixes
    named = [
        (EXAMPLES if word == "example-dataset" else WEIGHTS, path.format(dtype=suffix))
        for word in words
        for path in SETS.get(word, [])
    ]
    return list(dict.fromkeys(named))


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


def download(words: list[str], folder: Path, dry_run: bool = False) -> None:
    """Downloads what the words name into `folder`, or only lists it.

    Raises:
        DownloadError: see `choose`, `look_up` and `fetch`; or a local file of that name is another one.
    """
    files = [look_up(*named) for named in choose(words)]
    missing = [file for file in files if not (folder / file.name).exists()]
    for file in files:
        state = "to download" if file in missing else "here"
        print(f"{file.size_bytes / 1e6:>10,.1f} MB  {file.name:<32} {state}")
    if dry_run:
        return
    for file in files:
        problem = None if file in missing else difference(folder / file.name, file)
        if problem:
            raise DownloadError(
                f"{folder / file.name} is not the hub's ({problem}); move or delete it and run the same command again"
            )
    _check_space(missing, folder)
    for file in missing:
        print(f"{fetch(file, folder)}: complete, size and hash are right", flush=True)


def _check_space(files: list[RemoteFile], folder: Path) -> None:
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


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="SET", help=f"{', '.join(SETS)}; and {', '.join(DTYPES)}")
    parser.add_argument("--folder", type=_folder, default=Path(__file__).resolve().parent, help="default: models/")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, download nothing")
    options = parser.parse_args(arguments)
    try:
        download(options.words, options.folder, options.dry_run)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
