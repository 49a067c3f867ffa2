"""Settings and fixtures of all tests."""

import torch

from tests.small_cascade import drawing_cascade as drawing_cascade
from tests.small_cascade import small_cascade as small_cascade

# Small tensors gain nothing from threads, and on a busy machine threads that wait for each other cost a lot.
torch.set_num_threads(1)
