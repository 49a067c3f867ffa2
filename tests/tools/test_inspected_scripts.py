"""Every training script has a page of its data, with its own buckets, captions and fields."""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, settings_of, use_case
from tools import inspect_dataset

TRAIN = Path(inspect_dataset.__file__).parents[1] / "train"


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_dit", of=SETTINGS))
def test_every_script_has_a_page_of_its_data(small_cascade, tmp_path, name):
    settings = settings_of(small_cascade, name, "run")
    config, out = tmp_path / "page.yaml", tmp_path / "page.html"
    config.write_text(yaml.safe_dump(json.loads(json.dumps(settings, default=str))), encoding="utf-8")
    inspect_dataset.main([str(TRAIN / f"{name.split()[0]}.py"), str(config), str(out)])
    page = out.read_text(encoding="utf-8")
    found = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert found["samples"]
    assert all("crop" in sample for sample in found["samples"]), found["unreadable"]
    learns_texts = use_case(name).needs_captions is not False and settings.get("num_classes") is None
    assert any(found["rows"]["caption"]) == learns_texts
