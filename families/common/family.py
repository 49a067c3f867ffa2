"""What a family tells tools and inference scripts about itself, so that these need not name it.

Each family folder has a `family.py` with one object, `FAMILY`, of a subclass of `Family`; or with several, `FAMILIES`,
where networks with other tasks and files share a folder. Importing it is quick: what builds networks or imports
diffusers, transformers or peft is named as text, or imported inside its methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from families.common.converted import ConvertedConfig
from families.common.weight_files import Header
from warpcore.config import Settings
from warpcore.errors import UserError

if TYPE_CHECKING:
    from families.common.imported import ImportedRecord

TEXT_TO_IMAGE = "text to image"
"""The task of `inference/text_to_image.py`: a class as `families.common.text_to_image.TextToImage`."""
CLASS_TO_IMAGE = "class to image"
"""The task of `inference/class_to_image.py`: a class as `families.common.class_to_image.ClassToImage`."""
TEXT_TO_VIDEO = "text to video"
"""The task of `inference/text_to_video.py`: a class as `families.common.text_to_video.TextToVideo`."""
RECONSTRUCTION = "reconstruction"
"""The task of `inference/reconstruct.py`: a class as `families.common.reconstruction.Reconstruction`."""
SCRIPTS = {
    TEXT_TO_IMAGE: "inference/text_to_image.py", CLASS_TO_IMAGE: "inference/class_to_image.py",
    TEXT_TO_VIDEO: "inference/text_to_video.py", RECONSTRUCTION: "inference/reconstruct.py",
}  # fmt: skip
SCORING = "scoring"
"""The task of `benchmarks/learning.py`: a class as `families.common.scoring.Scored`."""


@dataclass(frozen=True)
class ExportFormat:
    """A format that `tools/export.py` writes."""

    name: str
    source: str
    """What it reads, as the help says it."""
    target: str
    """What it writes, as the help says it."""
    write: Callable[[Path, Path, list[str]], None]
    """Writes the target of a source, given further `key=value` arguments; see `families.common.exports`."""
    writes_folder: bool = False
    """Whether the target is a folder, and not a safetensors file."""
    keys: Callable[[], type[Settings]] | None = None
    """Gives the class that holds its further arguments; None where it takes none."""
    endings: tuple[str, ...] = (".safetensors",)
    """How the name of the target may end, where it is a file."""

    @classmethod
    def of(
        cls,
        module: str,
        name: str,
        source: str,
        target: str,
        function: str,
        *first: Any,
        keys: str | None = None,
        writes_folder: bool = False,
        endings: tuple[str, ...] = (".safetensors",),
    ) -> Self:
        """The format that a function of a module writes, called with `first` before the arguments of `write`.

        The module is imported when the function, or its class of keys named `keys`, is needed.
        """

        def write(source: Path, target: Path, arguments: list[str]) -> None:
            getattr(import_module(module), function)(*first, source, target, arguments)

        def keys_of() -> type[Settings]:
            return getattr(import_module(module), keys)

        return cls(name, source, target, write, writes_folder, keys and keys_of, endings)


class Family:
    """A model family; override what it has."""

    name: ClassVar[str]
    """The name of its folder, where that holds no other; exported files say it."""
    title: ClassVar[str]
    """Its name in messages."""
    weight_keys: ClassVar[Mapping[str, str]] = {"generator": "generator_checkpoint_path"}
    """The names of the weights files that its runs export (without `.safetensors`), and for each the config key of
    inference scripts that takes it."""
    formats: ClassVar[Sequence[ExportFormat]] = ()
    """The formats that it exports; names are shared where two families export the same format."""
    format_notes: ClassVar[str] = ""
    """What the help of `tools/export.py` says beneath its formats."""
    tasks: ClassVar[Mapping[str, str]] = {}
    """The class that does each of the tasks above, as MODULE.CLASS, which is imported when it is needed. It has a
    `Config`, a subclass of `Settings`, and is made of one."""

    def has_run(self, config: Mapping[str, Any], weights: Mapping[str, Header]) -> bool:
        """Whether a run is this family's.

        Args:
            config: the run's saved keys.
            weights: the headers of its exported files, by the names in `weight_keys`; none before its first save.
        """
        return any(map(self.has_weights, weights.values()))

    def has_weights(self, header: Header) -> bool:
        """Whether a safetensors file holds weights of this family, by the names of its tensors or its metadata."""
        return False

    def has_model_folder(self, index: Mapping[str, Any]) -> bool:
        """Whether a model folder is this family's, given its `model_index.json` or `config.json`."""
        return False

    def has_folder(self, folder: Path) -> bool:
        """Whether a folder without such a file holds what this family was published as."""
        return False

    def imported_features(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Features of a sample, tensors without a batch dimension, by the names that trainings of the family have.

        tensors: what another program stored of the sample in a safetensors file.

        Raises:
            ValueError: it is nothing that the family knows; the message goes on behind "it".
        """
        raise ValueError("holds what this family can't read: it knows no features of other programs")

    def imported_records(self, folder: Path) -> Iterator["ImportedRecord"]:
        """The samples of a folder of records, the cache of another program.

        Raises:
            UserError: it is damaged, or nothing that the family knows; the message names the file.
        """
        raise UserError(f"{folder}: {self.title} knows no records of other programs")

    def converted_config(self, config: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> ConvertedConfig | None:
        """Our keys for a training configuration of another program; None where the family knows no such program.

        deepspeed: the one that DeepSpeed gets beside it; empty without.

        Raises:
            ValueError: a key is unknown, or has a value that it can't have; the message names it.
        """
        return None

    def task(self, name: str) -> type | None:
        """The class that does a task for this family; None where it has none."""
        if name not in self.tasks:
            return None
        module, _, kind = self.tasks[name].rpartition(".")
        return getattr(import_module(module), kind)

    def config_of(self, name: str) -> type[Settings] | None:
        """The keys of a task, None where the family has none."""
        task = self.task(name)
        return None if task is None else task.Config
