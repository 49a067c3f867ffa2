"""Masks, samples of a prior and caption templates work in every training script of a diffusion model."""

import pytest
import torch
from PIL import Image

from tests.caches import make_cache, write_pictures
from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, settings_of, train, use_case
from tests.train.test_separate_caches import CACHED, CHANGES
from tests.train.test_train_c_lora import write_samples
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
SCRIPTS = [
    name
    for name in SETTINGS
    if "masked_loss" in use_case(name).Config.model_fields.keys() - use_case(name).Config.unused
]
QUICK = [name for name in SCRIPTS if name != "train_sd texts"]


@pytest.fixture
def recorded(small_cascade, tmp_path):
    """Trains a script for one update on two masked samples and two of a prior; returns its settings and records."""

    def run(name: str, **changes) -> dict:
        seen, kind = {}, use_case(name)

        class Recorded(kind):
            def encode(self, batch, random):
                seen.setdefault("batch", batch)
                return super().encode(batch, random)

            def denoising_loss(self, latents, random, predict, *further):
                def measured(diffused, predicted, mask):
                    seen.setdefault("mask", mask)
                    return of_process(diffused, predicted, mask)

                of_process, self.diffusion.loss = self.diffusion.loss, measured
                losses = super().denoising_loss(latents, random, predict, *further)
                self.diffusion.loss = of_process
                weight, self.sample_weight = self.sample_weight, None
                plain = super().denoising_loss(latents, random, lambda x, t: predict(x, t), *further)
                self.sample_weight = weight
                seen.setdefault("share", (losses.loss / plain.loss).detach())
                return losses

        left = Image.new("L", (64, 64))
        left.paste(255, (0, 0, 32, 64))
        settings = settings_of(small_cascade, name, "run") | {
            "webdataset_path": write_samples(tmp_path / "own.tar", [left] * 2), "updates": 1, "save_every": 1,
            "prior_path": write_samples(tmp_path / "prior.tar", [None] * 2), "prior_weight": 0.25,
            "masked_loss": True, "caption_templates": ["a template [fernando]"], "caption_dropout": 0.0,
            "validation_samples": 0, "batch_size": 4, "micro_batch_size": 4,
        }  # fmt: skip
        known = {key: value for key, value in settings.items() if key not in kind.Config.unused}
        train(name, known | changes, Recorded)
        return seen

    return run


@pytest.mark.parametrize("name", represented_by(*QUICK, of=SCRIPTS))
def test_masks_prior_and_templates_work_in_every_script(recorded, name):
    seen = recorded(name)
    batch, mask = seen["batch"], seen["mask"]
    prior = torch.tensor([key.startswith("prior") for key in batch.keys])
    assert sorted(prior.tolist()) == [False, False, True, True]
    if "caption_templates" not in use_case(name).Config.unused:
        assert [caption.startswith("a template") for caption in batch.captions] == (~prior).tolist()
    torch.testing.assert_close(seen["share"], torch.where(prior, 0.25, 1.0), rtol=1e-5, atol=0)
    width = mask.shape[-1]
    assert mask.shape[:2] == (4, 1)
    assert (mask[prior] == 1).all()
    if width % 2 == 0:
        assert (mask[~prior][..., : width // 2] == 1).all()
        assert (mask[~prior][..., width // 2 :] == 0).all()


def test_a_prior_that_is_not_there_is_named_by_its_key(small_cascade, tmp_path):
    settings = settings_of(small_cascade, "train_sd", "run") | {"prior_path": str(tmp_path / "prior.tar")}
    with pytest.raises(UserError, match=r"^prior_path: no such tar: .*prior\.tar"):
        train("train_sd", settings)


@pytest.mark.parametrize(
    "name", represented_by("train_sd", of=[n for n, kinds in CACHED.items() if "latents" in kinds and n in SCRIPTS])
)
def test_a_cache_with_masks_gives_the_losses_of_pictures_with_masks(small_cascade, name, tmp_path):
    given = settings_of(small_cascade, name, "pictures") | {
        "webdataset_path": str(write_pictures(tmp_path / "pictures" / "0.tar", 4)), "crop_mode": "center",
        "masked_loss": True, "updates": 2, "save_every": 2, "validation_samples": 0, "sample_count": 1,
        "sample_steps": 1,
    }  # fmt: skip
    given |= CHANGES.get(name, {})
    cache = make_cache(name, given, tmp_path / "cache", "--features", "latents", "--dtype", "float32")
    expected = train(name, given)
    found = train(name, given | {"experiment_id": "cached", "caches": [str(cache)]})
    assert [line["samples_hash"] for line in found] == [line["samples_hash"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=2e-5)
    (plain,) = train(name, given | {"experiment_id": "plain", "masked_loss": False, "updates": 1})
    assert plain["loss"] != pytest.approx(expected[0]["loss"], rel=1e-6)  # at 16 px per position, masks are alike
