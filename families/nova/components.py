"""Where the networks beside NOVA's transformer are: where a key says, beside the transformer, or on the hub."""

from pathlib import Path

from families.common.library_files import component_folder
from families.common.weight_source import local_weights, only_parts
from families.nova.config import NovaSettings
from families.nova.files import PART
from warpcore.meta import are_only_shapes


def part_of(settings: NovaSettings, key: str, part: str) -> Path:
    """The file or folder that the key of a network names; else the folder `part` of the pipeline that
    `generator_checkpoint_path` names; else that of the published network.

    What is only on the hub is downloaded, but for shapes alone.
    """
    given = getattr(settings, key)
    if given is None and (beside := _beside(settings.generator_checkpoint_path, part)) is not None:
        return beside
    if given is None:
        given = Path(settings.version.autoencoder if part == "vae" else settings.version.text_encoder)
    with only_parts(f"{part}*"):
        place = given if are_only_shapes() else local_weights(given, key)
    return component_folder(place, part)


def _beside(transformer: Path | None, part: str) -> Path | None:
    """The folder of a network in the pipeline whose folder, or whose transformer's, is given."""
    if transformer is None:
        return None
    pipelines = (transformer, transformer.parent) if transformer.name == PART else (transformer,)
    return next((folder / part for folder in pipelines if (folder / part).is_dir()), None)
