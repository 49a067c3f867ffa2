"""Locks on files, where the file system has any."""

import errno
import fcntl
import logging
from typing import IO

_HAS_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""How NFS and Lustre say that they were mounted without flock."""
_reported: set[str] = set()

logger = logging.getLogger(__name__)


def lock_file(file: IO, name: str, wait: bool = True) -> None:
    """Hold the exclusive lock of an open file until it is closed.

    A file system without locks can hold a run all the same: that is logged, once per process and `name`.

    Args:
        name: what the lock guards, for that message.
        wait: until another process closes the file.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
        if name not in _reported:
            _reported.add(name)
            logger.warning(
                "%s: the file system has no locks (flock: %s). Make sure that no other process writes there",
                name, error.strerror,
            )  # fmt: skip
