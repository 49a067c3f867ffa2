"""The memory through which data workers hand their batches over."""

import errno
import os
import shutil

SHARED_MEMORY = "/dev/shm"


def is_full(error: Exception) -> bool:
    """Whether it was raised by PyTorch, which makes shared memory for a batch, or by the semaphores of a queue.

    Both read as a full disk, though no disk has anything to do with it: they name no file on one.
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.filename is None
    return isinstance(error, RuntimeError) and "shared memory" in str(error) and "No space left" in str(error)


def full_message() -> str:
    usage = shutil.disk_usage(SHARED_MEMORY) if os.path.isdir(SHARED_MEMORY) else None
    room = f" ({usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB are free)" if usage else ""
    return (
        f"the shared memory {SHARED_MEMORY}, through which data workers hand their batches over, is full{room}; no "
        "disk is. Give it more room (docker run --shm-size=8g), lower num_workers or the micro-batch size, or write "
        "num_workers: 0, which needs none of it"
    )
