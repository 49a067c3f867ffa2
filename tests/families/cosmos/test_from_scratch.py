"""A denoiser without a weights file that is too large to be drawn whole: the same run on one process and on two."""

import pytest
import torch

from families.common import random_start
from families.cosmos import build
from families.cosmos.config import CosmosSettings
from families.cosmos.versions import VERSIONS
from tests.many_processes import launch_processes
from tests.warpcore.runs import read_metrics, tiny_settings, write_shard
from train.train_cosmos import TrainCosmos
from warpcore.config import make_config

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


def _train(settings: dict) -> None:
    random_start.DRAWN_WHOLE = 0
    VERSIONS["mini"].transformer.update(SMALL)
    assert TrainCosmos(make_config(TrainCosmos.Config, settings)).run() == 0


def test_layers_that_are_drawn_late_start_as_those_of_a_small_network(monkeypatch):
    """By their spread: modulations zero, norms one, the others as wide as their inputs say."""
    monkeypatch.setattr(random_start, "DRAWN_WHOLE", 0)
    torch.manual_seed(3)
    network = build.transformer(CosmosSettings(model_version="mini"))
    kinds = {"zero": 0, "one": 0, "spread": 0}
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all()
            kinds["one"] += 1
        elif ".norm" in name and "linear_2" in name:
            assert (parameter == 0).all()
            kinds["zero"] += 1
        else:
            deviation = parameter.shape[1] ** -0.5
            assert parameter.abs().max() <= 3 * deviation
            assert parameter.std().item() == pytest.approx(0.9866 * deviation, rel=0.1)  # cut at 3 deviations
            kinds["spread"] += 1
    assert all(kinds.values())


@pytest.mark.slow
@pytest.mark.integration
def test_it_is_the_same_on_any_number_of_processes(tmp_path):
    settings = tiny_settings(
        tmp_path, write_shard(tmp_path / "a.tar", 4, (64, 64)), model_version="mini", image_size=64, updates=2,
        text_encoder_precision="float32", batch_size=2, micro_batch_size=1, save_every=2, sample_count=1,
        sample_steps=1, ema_start_iters=None,
    )  # fmt: skip
    launch_processes(1, _train, settings)
    together = settings | {"experiment_id": "together", "use_fsdp": True}
    launch_processes(2, _train, together)
    for line, other in zip(read_metrics(together), read_metrics(settings), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
