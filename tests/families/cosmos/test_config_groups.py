"""The config groups in configs/training/cosmos mix and match: every combination is a config, in any order."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from train.train_cosmos import TrainCosmos
from train.train_cosmos_lora import TrainCosmosLora
from warpcore.config import Config, load_config, make_config
from warpcore.config_files import read_config

FOLDER = Path(__file__).parents[3] / "configs" / "training" / "cosmos"
FILES = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
NEEDED = ("model", "optimizer", "schedule", "checkpoints", "data")
"""Groups of which a run takes one file each; of the others, one or none."""
GROUPS = {name: [stem for stem in FILES if stem.partition("_")[0] == name] for name in
          {stem.partition("_")[0]: None for stem in FILES}}  # fmt: skip
KEYS = {stem: read_config(path)[0] for stem, path in FILES.items()}


def combinations() -> list[tuple[str, ...]]:
    """The files of each combination; a LoRA's weights are never kept in bfloat16."""
    choices = [stems if name in NEEDED else [None, *stems] for name, stems in GROUPS.items()]
    found = [tuple(filter(None, chosen)) for chosen in product(*choices)]
    return [files for files in found if not {"lora", "weights_bfloat16"} <= {*files}]


def config_of(stems: tuple[str, ...]) -> type[Config]:
    return (TrainCosmosLora if "lora" in stems else TrainCosmos).Config


def merged(stems: tuple[str, ...]) -> Config:
    values = {"experiment_id": "mixed"}
    for stem in stems:
        values |= KEYS[stem]
    return make_config(config_of(stems), values)


def test_a_key_stands_in_one_group_alone():
    assert {*NEEDED, "ema", "fsdp", "lora", "weights"} == GROUPS.keys()
    owners: dict[str, str] = {}
    for name, stems in GROUPS.items():
        for key in {key for stem in stems for key in KEYS[stem]}:
            assert owners.setdefault(key, name) == name, key


def test_every_combination_is_a_config():
    found = combinations()
    assert len(found) > 500
    for stems in found:
        config = merged(stems)
        wanted = {key: value for stem in stems for key, value in KEYS[stem].items()}
        assert config.model_fields_set == wanted.keys() | {"experiment_id"}


@pytest.mark.parametrize("turned", [False, True])
def test_bases_of_a_file_give_the_same_in_any_order(tmp_path, turned):
    stems = ("model_14b", "fsdp_8", "lora", "optimizer_lora", "schedule_lambdalinear", "ema_power", "checkpoints",
             "data_cached")  # fmt: skip
    bases = [str(FILES[stem]) for stem in (reversed(stems) if turned else stems)]
    (tmp_path / "mixed.yaml").write_text(yaml.safe_dump({"base": bases, "experiment_id": "mixed"}))
    assert load_config(TrainCosmosLora.Config, [str(tmp_path / "mixed.yaml")]) == merged(stems)
