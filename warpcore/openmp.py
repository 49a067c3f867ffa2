"""How long OpenMP's threads spin while they wait for each other. Import this before `torch`, which loads OpenMP.

By default a thread of GNU OpenMP spins 300,000 times, about 10 ms, before it sleeps. Where other programs use the same
CPUs, one thread that is interrupted makes the others spin at each of the thousands of parallel loops of an update,
which takes many times as long. Here a thread sleeps much sooner; on a quiet machine that rarely happens, as the next
loop begins before (`benchmarks/busy.py` measures both). What the environment says already is left alone.
"""

import os

SPIN_COUNT = 10_000
"""Of GNU OpenMP, which PyTorch brings on Linux. Fewer help beside other work and cost time on a quiet machine."""
BLOCK_TIME_MS = 0
"""Of LLVM's and Intel's OpenMP, which count in milliseconds (200 by default)."""

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    os.environ.setdefault("KMP_BLOCKTIME", str(BLOCK_TIME_MS))
