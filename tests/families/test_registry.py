"""The registry finds families by their folders, and the family of a run, a file, a folder and of arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families import registry
from families.cascade import build
from families.cascade.config import ModelSettings
from families.common.family import RECONSTRUCTION, TEXT_TO_IMAGE
from families.common.weights import only_shapes
from warpcore.errors import UserError

ROOT = Path(__file__).parents[2]
HEAVY = ["diffusers", "transformers", "peft", "open_clip", "kornia"]


def written(path: Path, names, **metadata: str) -> Path:
    save_file({name: torch.zeros(1) for name in names}, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def networks():
    """The tensor names of the published cascade's networks."""
    settings = ModelSettings(model_version="3.6B")
    with only_shapes():
        made = {
            name: getattr(build, name)(settings) for name in ("stage_c", "stage_b", "stage_a", "encoder", "previewer")
        }
    return {name: list(network.state_dict()) for name, network in made.items()}


@pytest.mark.parametrize("name", ["stage_c", "stage_b", "stage_a", "encoder", "previewer"])
def test_published_weights_are_known_by_their_tensors(networks, name, tmp_path):
    assert registry.family_of(written(tmp_path / "published.safetensors", networks[name])).name == "cascade"


def test_a_run_is_known_by_its_config_and_by_its_weights(networks, tmp_path):
    (tmp_path / "config.yaml").write_text("model_version: mini\n")
    assert registry.family_of(tmp_path).name == "cascade"
    (tmp_path / "config.yaml").write_text("batch_size: 8\n")
    with pytest.raises(
        UserError, match="is a training run of no family that is known here \\(Stable Cascade, Stable Diffusion\\)"
    ):
        registry.family_of(tmp_path)
    written(tmp_path / "text_tower.safetensors", ["ln_final.bias"], clip_settings="{}")
    assert registry.family_of(tmp_path).name == "cascade"


def test_a_model_folder_is_known_by_its_index(tmp_path):
    (tmp_path / "prior").mkdir()
    index = tmp_path / "prior" / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableCascadePriorPipeline"}))
    assert registry.family_of(tmp_path).name == registry.family_of(tmp_path / "prior").name == "cascade"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match="of no family that is known here"):
        registry.family_of(tmp_path)


def test_metadata_that_names_a_family_counts_more_than_tensors(networks, tmp_path):
    file = written(tmp_path / "c.safetensors", networks["stage_c"], family="another")
    with pytest.raises(UserError, match="is a file of no family"):
        registry.family_of(file)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        registry.family_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a folder without config"):
        registry.family_of(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read as weights"):
        registry.family_of(tmp_path / "broken.safetensors")


def test_every_family_says_what_it_can():
    for family in registry.families():
        assert family.title
        for task in (TEXT_TO_IMAGE, RECONSTRUCTION):
            kind = family.task(task)
            assert kind is None or kind.Config is family.config_of(task)
        assert len({form.name for form in family.formats}) == len(family.formats)


@pytest.mark.integration
def test_listing_families_and_their_formats_imports_no_library_of_networks():
    code = (
        "import sys; from families import registry; registry.export_formats(); "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
