"""A key that a script has no use for is refused, unless that would stop a run that has begun with it."""

import logging

import pytest
import yaml

from tests.train.test_every_script import SETTINGS, train, use_case
from tests.train.test_every_script import settings as settings
from warpcore.config import ConfigError, make_config

SCRIPTS = [name for name in SETTINGS if " " not in name]
ONLY_WITH_ANOTHER_KEY = {
    "cache_size_gb", "cache_text_gb", "clip_image_checkpoint_path", "clip_image_model_name", "max_bad_samples",
    "on_data_change", "perceptual_weight", "prior_weight", "scratch_path", "processes", "huber_c", "huber_schedule",
    "multires_noise_discount", "size_condition", "tag_separator", "validation_caches", "autoencoder_version",
    "text_projection_checkpoint_path", "text_tokens", "autoencoder_frames", "sample_flow", "class_getter",
    "class_dropout",
}  # fmt: skip
"""`processes` is used before a run begins."""
READ_IN_ANY_CASE = {
    "multires_noise_iterations", "multires_noise_discount", "caption_templates", "cache_text", "shuffle_tags",
    "tag_dropout", "keep_tags", "repa", "tread", "masked_loss", "sample_sampler", "adaptive_loss_weight",
    "offset_noise",
}  # fmt: skip
"""Stage B's noise has many resolutions of its own, NOVA its own loss and sampler; networks without texts have
no captions, clips no masks; the script of a LoRA extends that of the whole network."""
VALUES = {
    "caption_templates": ["a {caption}"], "caption_dropout": 0.5, "cache_text": True, "shuffle_tags": True,
    "tag_dropout": 0.5, "keep_tags": 2,
    "captions_getter": ("json", "lambda j: j['a']"), "multires_noise_iterations": 2, "multires_noise_discount": 0.5,
    "repa": True, "tread": True, "masked_loss": True, "cache_text_gb": 1,
    "offset_noise": 0.5, "input_perturbation": 0.5, "adaptive_loss_weight": True, "sample_sampler": "ddim",
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_key_without_use_is_named(settings, name, caplog, tmp_path):
    kind = use_case(name).Config
    caplog.set_level(logging.INFO)
    plain = settings(name, "run")
    plain |= {key: 0.0 for key in ("offset_noise",) if key in plain}  # which excludes multi-resolution noise
    for key in kind.unused:
        given = plain | {key: VALUES.get(key, "somewhere.safetensors")}
        with pytest.raises(ConfigError, match=f"{key}: this script has no use for it; remove it"):
            make_config(kind, given)
        default = kind.model_fields[key].default
        assert make_config(kind, given | {key: default}) == make_config(kind, plain)
        assert f"{key}: this script has no use for it" in caplog.text


def test_a_run_that_began_with_a_key_without_use_goes_on_with_it(settings, tmp_path, caplog):
    given = settings("train_c", "run") | {"stage_a_checkpoint_path": "somewhere.safetensors"}
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    make_config(use_case("train_c").Config, given)
    assert "stage_a_checkpoint_path: this script has no use for it" in caplog.text
    with pytest.raises(ConfigError, match="stage_a_checkpoint_path"):
        make_config(use_case("train_c").Config, given | {"stage_a_checkpoint_path": "other.safetensors"})


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_uses_the_keys_that_it_does_not_refuse(settings, name):
    case, read = use_case(name), set()

    class Recorded(case.Config):
        def __getattribute__(self, key):
            read.add(key)
            return super().__getattribute__(key)

    class Case(case):
        Config = Recorded

    train(name, settings(name, "run", updates=2), Case)
    keys = set(case.Config.model_fields)
    assert keys - read - ONLY_WITH_ANOTHER_KEY <= case.Config.unused
    assert not case.Config.unused & (read - READ_IN_ANY_CASE)
