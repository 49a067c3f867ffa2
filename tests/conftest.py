"""Settings and fixtures of all tests."""

import os

import torch

from tests.small_cascade import cascade_files as cascade_files
from tests.small_cascade import drawing_cascade as drawing_cascade
from tests.small_cascade import small_cascade as small_cascade
from tests.tiers import Tiers

# Small tensors gain nothing from threads, and on a busy machine threads that wait for each other cost a lot. `make
# test-bits` also takes two.
torch.set_num_threads(int(os.environ.get("TEST_THREADS", 1)))


def pytest_configure(config):
    config.pluginmanager.register(Tiers(), "tiers")
