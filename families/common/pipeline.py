"""Drawing with several networks, one in memory at a time.

Pictures, their latents and everything between them are lists of tensors on the CPU, one for each picture, so that they
may have different sizes. A pipeline loads one network, works through them all in batches, and frees it.
"""

import logging
import resource
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from families.common.autoencoders import Autoencoder
from families.common.captions import cut_note
from families.common.inference import ComputeSettings
from warpcore.config import Settings
from warpcore.processes import choose_device, choose_dtype, launched
from warpcore.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)
Size = tuple[int, int]
GIB = 2**30


class Pipeline:
    """Networks that are each on the device only while they work."""

    def __init__(self, settings: ComputeSettings):
        self.settings = settings
        self.device = choose_device(settings.device, launched()[2])
        self.dtype = choose_dtype(settings.dtype, self.device)
        self._peaks: dict[str, int] = {}

    @contextmanager
    def holding(
        self, name: str, make: Callable[[Any], Network], settings: Settings | None = None
    ) -> Iterator[Network]:
        """A network on the device; its memory is free afterwards.

        make: builds it from `settings`, by default the pipeline's.
        """
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        network = make(settings or self.settings).to(self.device, self.dtype).eval().requires_grad_(False)
        try:
            with torch.inference_mode():
                yield network
        finally:
            network.to("meta")  # a name that a caller keeps for it would keep its weights too
            if on_cuda:
                peak = torch.cuda.max_memory_allocated(self.device)
                self._peaks[name] = max(peak, self._peaks.get(name, 0))
                torch.cuda.empty_cache()

    def peak_memory(self) -> str:
        """What was needed at most so far, as text: of the GPU for each network, else of the whole process."""
        if self._peaks:
            parts = ", ".join(f"{name} {peak / GIB:.2f}" for name, peak in self._peaks.items())
            return f"peak memory of the GPU in GiB: {parts}"
        unit = 1 if sys.platform == "darwin" else 1024
        return f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB:.2f} GiB"

    def in_batches(self, name: str, kinds: Sequence[Hashable], work: Callable[[list[int]], Tensor]) -> list[Tensor]:
        """What `work` makes of batches of rows of one kind, in the order of rows, in float32 on the CPU.

        `work` gets row numbers and gives (B, ...); a row's tensor is without B.

        Args:
            name: what the progress bar says.
            kinds: of each row, such as its size; rows of different kinds do not share a batch.
        """
        groups: dict[Hashable, list[int]] = {}
        for row, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(row)
        most = self.settings.batch_size
        batches = [rows[i : i + most] for rows in groups.values() for i in range(0, len(rows), most)]
        made: dict[int, Tensor] = {}
        for rows in ProgressBar(batches, desc=name, unit="batch"):
            made |= zip(rows, work(rows).float().cpu(), strict=True)
        return [made[row] for row in range(len(kinds))]

    def batch(self, tensors: Sequence[Tensor], rows: list[int], dtype: torch.dtype | None = None) -> Tensor:
        """Rows of a list of tensors, all of one shape, as one (B, ...) on the device."""
        return torch.stack([tensors[row] for row in rows]).to(self.device, dtype or self.dtype)

    def rows(self, conditions: Mapping[str, Tensor], rows: list[int]) -> dict[str, Tensor]:
        """Rows of conditions (N, ...) on the device; what is the same for all, (1, ...), stays so."""
        return {name: (all_ if len(all_) == 1 else all_[rows]).to(self.device) for name, all_ in conditions.items()}


class LatentPipeline(Pipeline):
    """A denoiser of latents, into which LoRAs are merged, with what encodes texts and pictures."""

    build_autoencoder: Callable[[Any], Autoencoder]
    """Builds it from the settings."""

    def __init__(self, settings: ComputeSettings, loras: Sequence = ()):
        super().__init__(settings)
        self.loras = loras

    def read_texts(
        self, make: Callable[..., Network], texts: Sequence[str], told: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The conditions of texts (N, ...) by the denoiser's names, on the CPU; texts that are cut are named.

        Args:
            make: builds the text encoder from the settings, for a `device`.
            told: conditions of some texts, of their states (B, L, D) and numbers of tokens (B,), on the CPU.
        """
        most, parts = self.settings.batch_size, []
        with self.holding("text encoder", partial(make, device=self.device)) as encoder:
            for note in cut_note(encoder, texts, "prompts"):
                logger.warning(note)
            for start in range(0, len(texts), most):
                made = encoder(list(texts[start : start + most]))
                parts.append(told(made.hidden.cpu(), made.lengths.cpu()))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def decode(self, latents: Sequence[Tensor], tiled: bool = False) -> list[Tensor]:
        """Pictures (3, H, W) in [0, 1] of scaled latents (C, h, w)."""
        with self.holding("autoencoder", self.build_autoencoder) as autoencoder:
            autoencoder.tiling = tiled
            return self.in_batches(
                "autoencoder",
                sizes_of(latents),
                lambda rows: autoencoder.decode(self.batch(latents, rows, torch.float32)),
            )


def sizes_of(tensors: Sequence[Tensor]) -> list[Size]:
    """(H, W) of pictures or latents (C, H, W)."""
    return [tuple(tensor.shape[-2:]) for tensor in tensors]
