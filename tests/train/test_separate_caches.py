"""Every training script that has features reads those of pictures and of texts from folders of their own."""

from math import prod

import pytest

from families.common.cache import buckets_of, find_caches, origin_of
from families.common.training import DiffusionTraining
from tests.caches import make_cache
from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, train, use_case
from tests.train.test_every_script import settings as settings
from warpcore.clips import STRIP_FRAMES
from warpcore.config import ConfigError, make_config
from warpcore.pictures import read_cells

pytestmark = pytest.mark.integration
CACHED: dict[str, tuple[str, ...]] = {
    "train_b": ("latents", "texts"),
    "train_c": ("latents", "texts"),
    "train_c_controlnet": ("texts",),
    "train_c_lora": ("latents", "texts"),
    "train_cosmos": ("latents", "texts"),
    "train_cosmos_lora": ("latents", "texts"),
    "train_dit": ("latents",),
    "train_latte": ("latents",),
    "train_nova": ("latents", "texts"),
    "train_pixart": ("latents", "texts"),
    "train_pixart_lora": ("latents", "texts"),
    "train_sd": ("latents", "texts"),
    "train_sd_lora": ("latents", "texts"),
    "train_stdit": ("latents", "texts"),
    "train_stdit_lora": ("latents", "texts"),
}
"""What each script can read from a cache."""
CHANGES = {
    "train_latte": {"frame_stride": 4},  # as far as the clips of the tests go: each use is the same clip
    "train_b": {"effnet_scale": [1.0, 1.0]},
    "train_c_lora": {"train_tokens": None},
    "train_sd_lora": {"train_tokens": None, "text_encoder_filters": [], "text_encoder_lr": None},
}
SPARED = {
    "train_b": {"encoder", "text"}, "train_c": {"encoder", "text"}, "train_c_controlnet": {"text"},
    "train_c_lora": {"encoder", "text"}, "train_cosmos": {"text"}, "train_cosmos_lora": {"text"},
    "train_dit": set(), "train_latte": set(), "train_nova": {"text"}, "train_pixart": {"text"},
    "train_pixart_lora": {"text"},
    "train_sd": {"text"}, "train_sd_lora": {"text"},
    "train_stdit": {"text"}, "train_stdit_lora": {"text"},
}  # fmt: skip
"""Networks that are not built then; the autoencoders of the others draw samples."""


@pytest.mark.parametrize("name", represented_by("train_c", of=CACHED))
def test_caches_apart_are_pictures(settings, name, tmp_path):
    given = settings(name, "pictures", crop_mode="center", **CHANGES.get(name, {}))
    folders = [
        str(make_cache(name, given, tmp_path / kind, "--features", kind, "--dtype", "float32"))
        for kind in CACHED[name]
    ]
    expected, built = train(name, given), set()

    class Watched(use_case(name)):
        def build(self):
            networks = super().build()
            built.update(networks)
            return networks

    found = train(name, given | {"experiment_id": "apart", "caches": folders}, Watched)
    assert not built & SPARED[name]
    assert [line["samples_hash"] for line in found] == [line["samples_hash"] for line in expected]
    for column in ("loss", "validation_loss"):
        pairs = [(line[column], other[column]) for line, other in zip(found, expected, strict=True) if column in other]
        assert pairs
        assert [pair[0] for pair in pairs] == pytest.approx([pair[1] for pair in pairs], rel=1e-4), column


@pytest.mark.parametrize("name", represented_by("train_cosmos", of=CACHED))
def test_a_cached_feature_of_another_width_is_refused(settings, name, tmp_path):
    kind, given = use_case(name), settings(name, "widths", **CHANGES.get(name, {}))
    training = kind(make_config(kind.Config, given))
    read = {one: shape for one in training.features if (shape := training.read_shape(one)) is not None}
    assert read or name == "train_b"
    for one, shape in read.items():
        of_picture = training.features[one].of_picture
        beside = [name for name, feature in training.features.items() if feature.of_picture == of_picture]
        for more in (1, 0):
            cached = [7 if size is None else size + more for size in shape]
            folder = tmp_path / f"{one}_{more}"
            folder.mkdir()
            origin_of(training, beside, shapes={one: {"64x64": cached}}).write(folder)
            found = kind(make_config(kind.Config, given | {"caches": [str(folder)]}))
            if not more:
                assert one in find_caches(found)
                continue
            with pytest.raises(ConfigError) as refused:
                find_caches(found)
            told = str(refused.value)
            assert f"{one} of a sample has the shape {' x '.join(map(str, cached))} there, made with " in told
            assert f"reads {' x '.join('any' if size is None else str(size) for size in shape)}. Name the" in told
            assert "_checkpoint_path), and make another: python3 tools/cache.py" in told


def test_every_script_with_features_is_tested_here():
    scripts = {name.split()[0] for name in SETTINGS}
    assert {name for name in scripts if issubclass(use_case(name), DiffusionTraining)} == set(CACHED)


@pytest.mark.parametrize(
    "name", represented_by("train_dit", of=[name for name in CACHED if "latents" in CACHED[name]])
)
def test_what_is_cached_of_pictures_is_decoded_to_look_at(settings, name, tmp_path):
    given = settings(name, "looked_at", crop_mode="center", **CHANGES.get(name, {}))
    latents = make_cache(name, given, tmp_path / "latents", "--features", "latents", "--dtype", "float32")
    make_cache(name, given, latents, "--preview", "3", str(tmp_path / "seen.png"))
    cells = read_cells(tmp_path / "seen.png")
    assert len({cell.caption for cell in cells}) == len(cells) == 3
    training = use_case(name)(make_config(use_case(name).Config, given))
    sizes = [(height, width, min(prod(frames), STRIP_FRAMES)) for *frames, height, width in buckets_of(training).sizes]
    shown = {(height, width * side_by_side) for height, width, side_by_side in sizes}
    assert {(cell.height, cell.width) for cell in cells} <= shown
