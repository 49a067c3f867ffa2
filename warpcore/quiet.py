"""Warnings of libraries that would only hide what matters: about what is meant to be, or is reported elsewhere."""

import logging
import warnings

_EXPECTED_LINES = {
    # torchao registers enums in a way that newer versions of PyTorch do not need.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
    # diffusers looks for types that newer versions of torchao do not have. No file that is read here holds them.
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}
"""What lines of the log hold, by the logger that writes them. diffusers imports torchao wherever it is installed."""


def ignore_expected_warnings() -> None:
    """In this process, from now on. The tests ignore the same ones (`filterwarnings` in pyproject.toml)."""
    # One process without a process group is a way to run.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    # `max_pixels` limits pictures; one that cannot be decoded is counted and named.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit", module=r"PIL\.Image")
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
    for name in _EXPECTED_LINES:
        logging.getLogger(name).addFilter(_is_unexpected)
    # Two lines of debugging for each tensor of a checkpoint, which no handler writes, take longer than to copy it.
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


def _is_unexpected(record: logging.LogRecord) -> bool:
    return _EXPECTED_LINES[record.name] not in str(record.msg)
