"""Hashes of whole columns of numbers: one per row in Python would take seconds per million rows."""

import numpy as np


def splitmix64(z: np.ndarray) -> np.ndarray:
    """(N,) uint64: the finaliser of splitmix64 (Steele et al. 2014), alike on every machine and numpy version."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
