"""Randomness that depends on what is drawn, never on who draws it.

Every random number of a run belongs to a sample (crop, caption dropout, timestep, noise) or to a micro-batch (a
network's dropout). Its seed is a hash of names and numbers, so no generator has to be saved, and a run that resumes on
another number of processes draws the same numbers.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from warpcore.transfer import to_device


def stable_hash(*parts: int | float | str) -> int:
    """A 63-bit integer that depends only on `parts`: equal on every machine, process and Python version."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return (
        int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little") >> 1
    )


class SampleRandom:
    """The random numbers of a micro-batch: one independent stream per sample and purpose.

    `name` states the purpose ("timestep", "noise", ...): asking twice for the same name gives the same numbers, and no
    purpose shifts the numbers of another. Numbers are drawn on the CPU, so every device sees the same ones. Those that
    Python decides by, such as whether a caption is dropped, come from `on_cpu`, which waits for no GPU.

    level: the noise level of all samples, from 0 (the least noise) to 1, where it is given; None: it is drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", level: float | None = None):
        self.seeds = list(seeds)
        self.device = torch.device(device)
        self.level = level

    def at(self, level: float) -> "SampleRandom":
        """The same random numbers, with a noise level that is given."""
        return SampleRandom(self.seeds, self.device, level)

    @property
    def on_cpu(self) -> "SampleRandom":
        """The same random numbers, on the CPU."""
        return SampleRandom(self.seeds, level=self.level)

    def uniform(self, name: str) -> Tensor:
        """(B,) float32 in [0, 1)."""
        return self._draw(name, (), torch.rand)

    def normal(self, name: str, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return self._draw(name, shape, torch.randn)

    def _draw(self, name: str, shape: tuple[int, ...], draw) -> Tensor:
        generator = torch.Generator("cpu")
        drawn = [
            draw(shape, generator=generator.manual_seed(stable_hash(seed, name))) for seed in self.seeds
        ]  # fmt: skip
        batch = torch.stack(drawn) if drawn else torch.empty((0, *shape))
        return to_device(batch, self.device)
