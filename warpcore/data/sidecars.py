"""Where what belongs to a tar or folder lies: beside it, or in a cache folder where its place can't be written.

`WARPCORE_INDEX_CACHE` (a folder or URL) puts all of it there instead. Otherwise the cache folder is that of the user,
or a temporary folder where the user has no home that can be written.
"""

import errno
import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from warpcore.data.storage import complete_url, storage_for
from warpcore.errors import UserError

CACHE_VARIABLE = "WARPCORE_INDEX_CACHE"
"""Environment variable with a folder or URL: indexes are written there instead of beside the tars."""
ABSENT = (FileNotFoundError, NotADirectoryError, PermissionError)
"""What opening a file raises where there is none to be read; the next place is tried then."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.EISDIR, errno.ENOTDIR)
"""How a folder in the place of a file, or a file in that of a folder, is told."""
_FULL = (errno.ENOSPC, errno.EDQUOT)

logger = logging.getLogger(__name__)
_reported: set[str] = set()


def locations(url: str, suffix: str) -> list[str]:
    """Where `url + suffix` may lie, best first."""
    beside = url + suffix
    if given := os.environ.get(CACHE_VARIABLE):
        return [_within(complete_url(given), url, suffix), beside]
    return [beside, *cache_locations(url, suffix)]


def cache_locations(url: str, suffix: str) -> list[str]:
    """Where it may lie on this machine if it does not lie beside `url`, best first."""
    return [_within(root, url, suffix) for root in _local_roots()]


def write_beside(url: str, suffix: str, content: bytes) -> str:
    """Write `url + suffix`, or its place in a cache where that is read-only or full. Returns where it lies.

    Raises:
        UserError: it can be written nowhere; names every place and why.
    """
    places = locations(url, suffix)
    refusals: list[str] = []
    for location in places[:1] if os.environ.get(CACHE_VARIABLE) else places:
        try:
            storage_for(location).write(location, content)
        except OSError as error:
            is_expected = isinstance(error, PermissionError) or error.errno in (*_READ_ONLY, *_FULL, *_IN_THE_WAY)
            if location == url + suffix and not is_expected:
                raise
            refusals.append(f"{os.path.dirname(location)}: {error.strerror or error}")
            continue
        _report(refusals, location)
        return location
    raise UserError(
        f"{os.path.basename(url + suffix)} can be written nowhere ({'; '.join(refusals)}). Make room there, or set "
        f"{CACHE_VARIABLE} to a folder that can be written"
    )


def _report(refusals: list[str], location: str) -> None:
    """Tell once of a full disk, and of a user's cache that can't be written either."""
    full = [refusal for refusal in refusals if any(refusal.endswith(os.strerror(number)) for number in _FULL)]
    told = [refusal for refusal in (refusals if len(refusals) > 1 else full) if refusal not in _reported]
    if told:
        logger.warning("%s; what belongs there is kept in %s", "; ".join(told), os.path.dirname(location))
    _reported.update(told)


def _within(root: str, url: str, suffix: str) -> str:
    name = hashlib.blake2b(url.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    return f"{root.rstrip('/')}/{name}-{url.rsplit('/', 1)[-1][-100:]}{suffix}"


def _local_roots() -> list[str]:
    return list(_roots_of(os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME"), tempfile.gettempdir()))


@cache
def _roots_of(cache_folder: str | None, home: str | None, temporary: str) -> tuple[str, ...]:
    """The cache folders of this machine, best first; none that belongs to another user."""
    roots = [Path(temporary, f"warpcore-{os.getuid()}")]
    if os.path.lexists(roots[0]) and roots[0].lstat().st_uid != os.getuid():
        logger.warning("%s belongs to another user: it is not used", roots.pop())
    try:
        roots.insert(0, Path(cache_folder) if cache_folder else Path(home or Path.home(), ".cache"))
    except RuntimeError:
        logger.warning("there is no home folder: indexes that can't lie beside their tars lie in %s", temporary)
    return tuple(complete_url(str(root / "warpcore" / "index")) for root in roots)
