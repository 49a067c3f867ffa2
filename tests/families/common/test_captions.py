"""Captions that an encoder cuts off, and tokens that stand in no caption, are told at the start of a run."""

import io
import json
import logging
import tarfile

import numpy as np
import pytest
from PIL import Image

from families.common.captions import is_cut
from families.common.sample_fields import texts_read
from modules.tokenizers import WordTokenizer, tokenize
from tests.caches import make_cache
from train.train_c import TrainStageC
from train.train_c_lora import TrainLora
from warpcore.config import make_config

WORDS = WordTokenizer([f"w{i}" for i in range(10)])
SHORT, LONG = "w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4 w5 w6 w7"
"""As long as the small text tower reads (8 tokens, with begin and end), and a word longer."""


def write_captioned(path, captions: list[str]) -> str:
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            picture = io.BytesIO()
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(
                picture, "PNG"
            )
            for extension, content in {"png": picture.getvalue(), "txt": caption.encode()}.items():
                info = tarfile.TarInfo(f"{path.stem}{i}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(path)


@pytest.mark.parametrize("text", ["", SHORT, LONG, "w1 " * 40, "what else", "w1,w2,w3", "w1,w2,w3,w4"])
def test_a_caption_is_cut_where_the_tokenizer_drops_tokens(text):
    _, mask = tokenize(WORDS, [text], 8, 0)
    assert is_cut(WORDS, 8, text) == (mask.sum() < len(WORDS.encode(text)) + 2)


def test_templates_are_filled_and_the_captions_of_the_prior_stay():
    captions = [("a", "one"), ("a", "two"), ("p", "three")]
    assert texts_read(captions, (), []) == ["one", "two", "three"]
    assert texts_read(captions, {"p"}, ["x {caption}", "y", "z"]) == ["x one", "y", "z", "three"]
    assert texts_read([], (), ["x", "y"]) == ["x", "y"]


def started(capfd, kind, settings: dict) -> str:
    """What a run says at its start."""
    run = kind(make_config(kind.Config, settings))
    try:
        run.setup()
    finally:
        run.close()
    return capfd.readouterr().err


@pytest.mark.integration
def test_captions_longer_than_the_text_encoder_reads_are_counted_at_the_start(small_cascade, tmp_path, capfd):
    data = write_captioned(tmp_path / "b.tar", [SHORT, LONG, LONG + " w8", "w1"])
    told = started(capfd, TrainStageC, small_cascade | {"webdataset_path": data, "sample_prompts": [SHORT, LONG]})
    assert "2 of 4 captions are longer than the 8 tokens that the text encoder reads" in told
    assert "1 of 2 sample_prompts are longer than the 8 tokens" in told
    assert "longer than" not in started(capfd, TrainStageC, small_cascade)


@pytest.mark.integration
def test_of_a_large_data_set_some_captions_of_every_folder_are_looked_at(small_cascade, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("families.common.captions.LOOKED_AT", 8)
    for folder, caption in (("own", LONG), ("prior", SHORT)):
        (tmp_path / folder).mkdir()
        for number in range(2):
            write_captioned(tmp_path / folder / f"{number}.tar", [caption] * 6)
    paths = [str(tmp_path / folder) for folder in ("own", "prior")]
    told = started(capfd, TrainStageC, small_cascade | {"webdataset_path": paths})
    assert "4 of 8 captions that were looked at are longer than the 8 tokens" in told


@pytest.mark.integration
def test_tokens_that_stand_in_no_caption_are_named_at_the_start(small_cascade, tmp_path, capfd):
    own = write_captioned(tmp_path / "own.tar", ["a [cat] w1", "w2"])
    prior = write_captioned(tmp_path / "prior.tar", ["w3 [COW]"])
    tokens = [["[cat]", "^w1"], ["[dog]", "^w1"], ["[cow]", None], ["^w3", None], ["^w9", None]]
    settings = small_cascade | {"module_filters": [".attn"], "rank": 1, "train_tokens": tokens, "webdataset_path": own}
    told = started(capfd, TrainLora, settings | {"prior_path": prior, "batch_size": 1})
    unused = [line.split()[1] for line in told.splitlines() if line.startswith("train_tokens:")]
    assert unused == ["[dog]", "^w9"]
    assert "stands in none of the 3 captions, those of the prior included: it learns nothing" in told
    assert "train_tokens=null trains no token" in told
    told = started(capfd, TrainLora, settings | {"batch_size": 1, "caption_templates": ["a [dog] w9", "{caption} w3"]})
    assert [line.split()[1] for line in told.splitlines() if line.startswith("train_tokens:")] == ["[cat]", "[cow]"]


@pytest.mark.integration
def test_a_cache_counts_all_captions_that_are_cut(small_cascade, tmp_path, capfd):
    data = write_captioned(tmp_path / "b.tar", [SHORT, LONG, LONG, "w1"])
    make_cache("train_c", small_cascade | {"webdataset_path": data}, tmp_path / "cache", "--variants", "2")
    assert "2 captions are longer than the text encoder reads" in capfd.readouterr().out
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("*.tar.cache.json"))
    assert record["cut_captions"] == 2


@pytest.mark.integration
def test_prompts_that_are_cut_are_told_when_they_are_drawn(drawing_cascade, caplog):
    from families.cascade.inference import DrawingSettings
    from families.cascade.sampling import Cascade

    with caplog.at_level(logging.WARNING):
        Cascade(make_config(DrawingSettings, drawing_cascade)).read([SHORT, LONG])
    assert "1 of 2 prompts are longer than the 8 tokens that the text encoder reads" in caplog.text
