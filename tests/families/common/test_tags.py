"""Captions that differ from draw to draw: tags in another order, tags left out, one of several captions."""

import pytest

from families.common.tags import TagSettings, drawn_tags
from tests.caches import make_cache, write_pictures
from tests.tiers import represented_by
from tests.train.test_every_script import OF_CLIPS, SETTINGS, settings_of, train, use_case
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

TAGS = ["1girl", "solo", "smile", "hat", "long hair", "outdoors"]
CAPTION = ", ".join(TAGS)

SCRIPTS = [
    name for name in SETTINGS
    if "shuffle_tags" in use_case(name).Config.model_fields.keys() - use_case(name).Config.unused
    and "num_classes" not in SETTINGS[name]
]  # fmt: skip


def drawn(count=400, caption=CAPTION, **settings):
    return drawn_tags([caption] * count, range(count), TagSettings(**settings))


def test_shuffling_keeps_every_tag_and_the_first_ones_in_their_places():
    found = [caption.split(", ") for caption in drawn(shuffle_tags=True, keep_tags=2)]
    assert all(sorted(tags) == sorted(TAGS) and tags[:2] == TAGS[:2] for tags in found)
    for place in range(2, 6):  # every other tag stands in every other place about as often
        counts = [sum(tags[place] == tag for tags in found) for tag in TAGS[2:]]
        assert min(counts) > 70, counts


def test_dropping_leaves_a_share_of_the_tags_out_in_their_order():
    found = [caption.split(", ") for caption in drawn(tag_dropout=0.25, keep_tags=1)]
    assert all(tags == [tag for tag in TAGS if tag in tags] and tags[0] == TAGS[0] for tags in found)
    counts = [sum(tag in tags for tags in found) for tag in TAGS[1:]]
    assert all(260 < count < 340 for count in counts), counts


def test_what_is_drawn_follows_from_the_seed_alone():
    settings = TagSettings(shuffle_tags=True, tag_dropout=0.3)
    both = drawn_tags([CAPTION] * 2, [5, 6], settings)
    assert both == [drawn_tags([CAPTION], [seed], settings)[0] for seed in (5, 6)]
    assert both[0] != both[1]


def test_tags_have_the_separator_of_the_config():
    assert sorted(drawn(1, "a. b|c d | e, f", shuffle_tags=True, tag_separator="|")[0].split("| ")) == [
        "a. b", "c d", "e, f",
    ]  # fmt: skip
    assert drawn(1, " a,b", keep_tags=1, tag_dropout=0.99) == ["a"]
    assert drawn(1, " a,b") == [" a,b"]  # nothing is asked for, and nothing changes
    assert drawn(1, "", shuffle_tags=True) == [""]
    with pytest.raises(ConfigError, match="keep_tags has no effect without shuffle_tags"):
        make_config(TagSettings, {"keep_tags": 1})


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_sd", of=tuple(SCRIPTS)))
def test_every_script_sees_the_captions_of_each_draw(small_cascade, tmp_path, name):
    """Several captions, and tags in another order, are the same whatever the micro-batches."""
    data = write_pictures(tmp_path / "a.tar", 4, caption="x, a, b, c, {0}\ny, a, b, c, {0}")
    several = {"captions_getter": ["txt", "lambda t: t.splitlines()"], "shuffle_tags": True, "keep_tags": 1}

    def seen(micro):
        found = {}

        class Recorded(use_case(name)):
            def encode(self, batch, random):
                captions = zip(batch.keys, batch.seeds, batch.captions, strict=True)
                found.update({(key, seed): caption for key, seed, caption in captions})
                return super().encode(batch, random)

        settings = settings_of(small_cascade, name, f"micro {micro}") | several | {
            "webdataset_path": str(data), "validation_samples": 0, "batch_size": 4, "micro_batch_size": micro,
            "save_every": 4, **({"num_frames": 1} if name in OF_CLIPS else {}),
        }  # fmt: skip
        train(name, settings, Recorded)
        return found

    found = seen(4)
    assert found == seen(2)
    assert {caption.split(", ")[0] for caption in found.values()} == {"x", "y"}
    assert len({tuple(caption.split(", ")[1:]) for caption in found.values()}) > 8


@pytest.mark.integration
def test_a_cache_of_texts_refuses_several_captions_of_a_sample(small_cascade, tmp_path):
    data = write_pictures(tmp_path / "a.tar", 4, caption="x {0}\ny {0}")
    settings = settings_of(small_cascade, "train_c", "run") | {
        "webdataset_path": str(data), "captions_getter": ["txt", "lambda t: t.splitlines()"]
    }  # fmt: skip
    with pytest.raises((UserError, SystemExit), match=r"a sample has 2 captions.*--features latents"):
        make_cache("train_c", settings, tmp_path / "cache")
    latents = make_cache("train_c", settings, tmp_path / "latents", "--features", "latents")
    train("train_c", settings | {"caches": [str(latents)], "updates": 2})
