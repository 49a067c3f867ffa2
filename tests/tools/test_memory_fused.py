"""Steps in the backward pass: what is counted is what they take, and they are suggested where they help."""

import pytest
from torch import nn

from tests.tools.test_memory import GIB, TRAIN, measured_peak
from tests.train.test_every_script import settings  # noqa: F401
from tests.warpcore.runs import tiny_settings
from tests.warpcore.tiny import Denoiser, TinyConfig
from tools import memory
from warpcore.config import Config, make_config
from warpcore.core import WarpCore
from warpcore.errors import UserError
from warpcore.planning import USABLE, Plan
from warpcore.rehearsal import OnShapes, Rehearsal, bucket_sizes, load_use_case

CAME = {"weights_dtype": "bfloat16", "optimizer": "came"}
FUSED = {"fused_backward": True, "clip_grad_norm": None}


class Deep(Denoiser):
    def build(self):
        networks = super().build()
        width = self.config.width
        hidden = [nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU()) for _ in range(30)]
        first, *_, last = networks["generator"]
        return {"generator": nn.Sequential(first, *hidden, last)}


def deep(tmp_path, **keys) -> Config:
    given = {"width": 64, "ema_start_iters": None, "batch_size": 1, "image_size": 8} | keys
    return make_config(TinyConfig, tiny_settings(tmp_path, tmp_path / "a.tar", **given))


def count(use_case: type[WarpCore], config: Config):
    with OnShapes(use_case, config, "cpu") as shapes:
        size = bucket_sizes(shapes.run)[0]
        counted = shapes.needs(size, config.batch_size)
        assert counted == shapes.needs(size, config.batch_size)  # the first one leaves nothing behind
    return counted


def check_counted(use_case: type[WarpCore], config: Config):
    """That what is counted is what an update takes; returns the count."""
    counted = count(use_case, config)
    with Rehearsal(use_case, config, memory_limit=GIB) as rehearsal:
        peak = measured_peak(rehearsal, bucket_sizes(rehearsal.run)[0], config.batch_size)
        living = sum(t.nbytes for t in rehearsal.living())
        assert counted.gradients == max(p.nbytes for p in rehearsal.run.parameters.values())
    assert counted.total == pytest.approx(living + peak, rel=0.10)
    return counted


@pytest.mark.integration
@pytest.mark.parametrize("keys", [CAME, {"optimizer": "adamw"}], ids=["came", "adamw"])
def test_what_is_counted_is_what_an_update_takes(tmp_path, keys):
    whole = count(Deep, deep(tmp_path, **keys))
    fused = check_counted(Deep, deep(tmp_path, **keys, **FUSED))
    assert whole.gradients == whole.weights == fused.weights
    assert (fused.optimizer, fused.frozen, fused.ema) == (whole.optimizer, whole.frozen, whole.ema)
    assert fused.total < whole.total


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_sd", "train_dit"])
def test_so_it_is_of_scripts_whose_layers_run_again(settings, name):  # noqa: F811
    use_case = load_use_case(TRAIN / f"{name}.py")
    keys = FUSED | {"activation_checkpointing": 3, "batch_size": 2}
    check_counted(use_case, make_config(use_case.Config, settings(name, "memory", **keys)))


@pytest.mark.integration
def test_they_are_suggested_where_gradients_do_not_fit(tmp_path, capsys):
    config = deep(tmp_path, batch_size=2, **CAME)
    plan = Plan(Deep, config, "cuda")
    with plan.shapes(FUSED) as shapes:
        total = plan.of_bucket(shapes, bucket_sizes(shapes.run)[0], 0).total
    memory.suggest(plan, 1.001 * total / USABLE)
    assert "fused_backward=true clip_grad_norm=null clip_tensor_norm=1.0" in capsys.readouterr().out
    with pytest.raises(UserError, match="train with one process"):
        Plan(Deep, config, "cuda", 2).shapes(FUSED)
