"""What training scripts of networks that draw classes share: classes of samples, their dropout, their names."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.class_keys import ClassSettings
from families.common.classes import NAMES_KEY, ClassField, names_said, title_of
from families.common.family import CLASS_TO_IMAGE
from families.common.next_commands import drawing_commands
from families.common.training import DiffusionTraining
from families.common.weight_files import metadata_of
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.random import SampleRandom

logger = logging.getLogger(__name__)

CLASS = "class"
"""What a batch calls the classes of its samples."""


class ClassSamples(DiffusionTraining):
    """Reads the classes of samples, where its config has `num_classes`; then no captions are read."""

    config: ClassSettings

    def __init__(self, config: ClassSettings):
        super().__init__(config)
        if self.learns_classes:
            self.class_field = ClassField.parse(config.class_getter, config.num_classes, config.class_names)

    @property
    def learns_classes(self) -> bool:
        return self.config.num_classes is not None

    @property
    def needs_captions(self) -> bool:
        return not self.learns_classes and super().needs_captions

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        super().begin(saved)
        own, file = self.config.class_names, self.config.generator_checkpoint_path
        if saved is not None:
            before = names_said(saved.get("about", {}), "class_names of the checkpoint")
            if own and before and own != before:
                raise UserError(
                    f"class_names: this run has learned {_changed(before, own)}. Restore the names, or begin another "
                    "run (experiment_id)"
                )
            return
        numbers = {name: i for i, name in enumerate(names_said(metadata_of(Path(file or "")), f"names of {file}"))}
        if moved := [(name, i, numbers[name]) for i, name in enumerate(own) if numbers.get(name, i) != i]:
            logger.warning(
                "class_names: %r is class %d here and class %d in %s: the network has to learn it again, unless the "
                "names are written in the order of that file", *moved[0], file,
            )  # fmt: skip

    def sample_fields(self, from_cache: bool) -> dict[str, Any]:
        return super().sample_fields(from_cache) | ({CLASS: self.class_field} if self.learns_classes else {})

    def labels(self, batch: Batch, random: SampleRandom) -> Tensor:
        """The classes (B,) of a batch, some of them replaced by the empty one."""
        labels, dropped = batch.extra[CLASS], random.uniform("class dropout") < self.config.class_dropout
        empty = labels.new_full((), self.config.num_classes)  # the last row of the network's table
        return torch.where(dropped, empty, labels)

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_classes if self.learns_classes else super().draws_samples

    def labels_to_draw(self, held_out: Batch | None) -> list[int]:
        """The classes of samples: those of the config, or else of held-out samples."""
        count = self.config.sample_count
        return self.config.sample_numbers[:count] if held_out is None else held_out.extra[CLASS][:count].cpu().tolist()

    def titles(self, labels: list[int]) -> list[str]:
        """What drawings of classes are called."""
        return [title_of(label, self.config.class_names) for label in labels]

    def next_commands(self) -> list[str]:
        if not self.learns_classes:
            return super().next_commands()
        return drawing_commands(CLASS_TO_IMAGE, self.config, classes=[*self.config.class_names, 0][:1])

    def file_metadata(self) -> dict[str, str]:
        names = self.config.class_names
        said = {NAMES_KEY: json.dumps({"names": names}, ensure_ascii=False)} if names else {}
        return super().file_metadata() | said


def _changed(before: list[str], own: list[str]) -> str:
    """Which class is called otherwise, in a sentence."""
    if len(before) != len(own):
        return f"{len(before)} classes, and here are {len(own)} names"
    number = next(i for i, pair in enumerate(zip(before, own, strict=True)) if pair[0] != pair[1])
    return f"class {number} as {before[number]!r}, which is {own[number]!r} here"
