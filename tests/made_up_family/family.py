"""The made-up family for the registry."""

from families.common.exports import write_new_files
from families.common.family import TEXT_TO_IMAGE, ExportFormat, Family
from families.common.weight_files import weights_in
from families.common.weights import read_weights


def to_folder(source, target, arguments) -> None:
    """A folder with one file, as libraries have it."""
    weights = read_weights(weights_in(source, "generator"), "source")
    write_new_files({target / "model.safetensors": (weights, {}), target / "config.json": '{"_class_name": "Cloud"}'})


class MadeUp(Family):
    name = "made_up_family"
    title = "Made up"
    weight_keys = {"generator": "generator_checkpoint_path", "lora": "lora"}
    formats = (
        ExportFormat("diffusers", "a run", "a folder", to_folder, writes_folder=True),
        ExportFormat("cloud", "a run", "a folder", to_folder, writes_folder=True),
    )
    tasks = {TEXT_TO_IMAGE: "tests.made_up_family.text_to_image.MadeUpTextToImage"}

    def has_weights(self, header):
        return {"clock.weight", "puffs.0.inner.weight"} <= header.names or header.metadata.get("family") == self.name

    def has_model_folder(self, index):
        return index.get("_class_name") == "Cloud"


FAMILY = MadeUp()
