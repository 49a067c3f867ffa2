"""Text conditions that a run keeps in the CPU's memory: for data sets of few captions."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from families.common.features import stack_rows, take_row
from warpcore.transfer import to_device

TextConditions = Callable[[Sequence[str]], dict[str, Tensor]]
"""Gives the text conditions (B, ...) of captions, by name."""


class TextMemory:
    """Text conditions that are computed once per caption and then kept in the CPU's memory.

    Args:
        make: gives the conditions (B, ...) of captions, by name.
        limit_bytes: what they may take. Captions beyond are computed whenever they occur.
        say: gets a message then.
        disk: how to store them on disk, for that message.
    """

    def __init__(self, make: TextConditions, limit_bytes: int, say: Callable[[str], None], disk: str = ""):
        self.make, self.limit_bytes, self.say, self.disk = make, limit_bytes, say, disk
        self.size_bytes, self.full = 0, False
        self._known: dict[str, dict[str, Tensor]] = {}

    def conditions(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """As `make` gives them.

        If one caption is new, the encoder sees them all: matrices of another size can differ in the last bit.
        """
        if any(caption not in self._known for caption in captions):
            made = self.make(captions)
            self._remember(captions, made)
            return made
        rows = [self._known[caption] for caption in captions]
        return {name: to_device(values, device) for name, values in stack_rows(rows).items()}

    def add(self, captions: Sequence[str], made: Mapping[str, Tensor]) -> None:
        """Remember conditions (B, ...) of captions that were made elsewhere, whatever memory they take."""
        made = {name: values.detach().cpu() for name, values in made.items()}
        made = {name: values.float() if values.is_floating_point() else values for name, values in made.items()}
        for place, caption in enumerate(captions):
            self._known[caption] = {name: value.clone() for name, value in take_row(made, place).items()}

    def _remember(self, captions: Sequence[str], made: dict[str, Tensor]) -> None:
        if self.full:
            return
        made = {name: values.detach().cpu() for name, values in made.items()}
        for place, caption in enumerate(captions):
            if caption not in self._known:
                row = {name: value.clone() for name, value in take_row(made, place).items()}
                row_bytes = sum(tensor.nbytes for tensor in row.values())
                if self.size_bytes + row_bytes > self.limit_bytes:
                    self.full = True
                    self.say(
                        f"cache_text: the text conditions of {len(self._known)} captions take "
                        f"{self.size_bytes / 1e9:.3g} GB (cache_text_gb); those of further captions are computed each "
                        f"time. Raise cache_text_gb, or {self.disk}"
                    )
                    return
                self._known[caption] = row
                self.size_bytes += row_bytes
