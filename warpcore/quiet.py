"""Warnings of libraries that would only hide what matters: about what is meant to be, or is reported elsewhere."""

import warnings


def ignore_expected_warnings() -> None:
    """In this process, from now on. The tests ignore the same ones (`filterwarnings` in pyproject.toml)."""
    # One process without a process group is a way to run.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    # `max_pixels` limits pictures; one that cannot be decoded is counted and named.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit", module=r"PIL\.Image")
    warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")
