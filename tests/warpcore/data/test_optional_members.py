"""An option whose input is optional per sample says how many samples have it, and refuses a new run where none has."""

import pytest
from PIL import Image

from tests.train.test_train_c_lora import LORA, write_samples
from train.train_c_lora import TrainLora
from warpcore.config import make_config
from warpcore.data.catalog import open_catalog
from warpcore.data.optional_members import check_optional
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError

WANTED = {"mask.png": "masked_loss: true"}


@pytest.fixture
def catalog(tmp_path):
    def catalog(*masks):
        return open_catalog(resolve_sources(write_samples(tmp_path / f"{len(masks)}.tar", list(masks))))

    return catalog


def test_an_option_without_any_input_is_an_error_for_a_new_run_and_a_message_for_an_old_one(catalog):
    none = catalog(None, None)
    with pytest.raises(UserError, match=r"masked_loss: true: no sample has a \.mask\.png.*Put NAME\.mask\.png beside"):
        check_optional(WANTED, none, {"mask.png": 0}, 2)
    (told,) = check_optional(WANTED, none, {"mask.png": 0}, 2, resumed=True)
    assert "no sample has a .mask.png, so it does nothing" in told


def test_masks_that_only_rejected_samples_have_are_none(catalog):
    with pytest.raises(UserError, match="no sample has"):
        check_optional(WANTED, catalog(None, Image.new("L", (64, 64))), {"mask.png": 0}, 1)


def test_some_input_is_counted(catalog):
    mask = Image.new("L", (64, 64))
    some = catalog(None, mask, mask)
    assert check_optional(WANTED, some, {"mask.png": 2}, 3) == ["masked_loss: true: 2 of 3 samples have a .mask.png"]
    assert check_optional(WANTED, some, None) == ["masked_loss: true: some samples have a .mask.png"]


@pytest.mark.integration
def test_masked_loss_without_masks_ends_a_run_before_it_begins(small_cascade, tmp_path, capfd):
    settings = small_cascade | LORA | {"masked_loss": True, "batch_size": 2, "log_every": 1}
    with pytest.raises(UserError, match=r"masked_loss: true: no sample has a \.mask\.png"):
        TrainLora(make_config(TrainLora.Config, settings)).run()
    assert not (tmp_path / "runs/c/config.yaml").exists()
    data = write_samples(tmp_path / "b.tar", [Image.new("L", (64, 64), 255), None])
    assert TrainLora(make_config(TrainLora.Config, settings | {"webdataset_path": data})).run() == 0
    assert "masked_loss: true: 1 of 2 samples have a .mask.png" in capfd.readouterr().err


@pytest.mark.integration
def test_a_run_that_began_without_masks_goes_on_and_says_so(small_cascade, monkeypatch, capfd):
    settings = small_cascade | LORA | {"masked_loss": True, "log_every": 1}
    with monkeypatch.context() as before:
        before.setattr("warpcore.feed.check_optional", lambda *_, **__: [])
        assert TrainLora(make_config(TrainLora.Config, settings)).run() == 0
    assert TrainLora(make_config(TrainLora.Config, settings | {"updates": 2})).run() == 0
    assert "masked_loss: true: no sample has a .mask.png, so it does nothing" in capfd.readouterr().err
