"""Settings and fixtures of all tests."""

import gc

import hypothesis
import torch

from tests.browser import browser as browser
from tests.many_processes import THREADS
from tests.small_cascade import cascade_files as cascade_files
from tests.small_cascade import drawing_cascade as drawing_cascade
from tests.small_cascade import small_cascade as small_cascade
from tests.tiers import Tiers

torch.set_num_threads(THREADS)
# The same examples each time: what fails on one machine fails on all. For others: pytest --hypothesis-profile=default
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_configure(config):
    config.pluginmanager.register(Tiers(), "tiers")


def pytest_collection_finish(session):
    """Imports leave a million objects, which would be walked by each collection; one comes at the end of every run."""
    gc.collect()
    gc.freeze()
