"""Gradients in a run: only the largest kept, and what is reported of them and of the weights."""

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
from tests.warpcore.runs import load_weights, read_metrics, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import Config, ConfigError, make_config
from warpcore.errors import UserError
from warpcore.evaluation import weight_norms
from warpcore.gradients import gradient_means, keep_largest, mean_groups


class Blocks(nn.Sequential):
    @property
    def blocks(self) -> list[nn.Module]:
        return [self[0], self[3]]


class WithBlocks(Denoiser):
    def build(self):
        networks = super().build()
        return {"generator": Blocks(*networks["generator"])}


@pytest.fixture
def settings(tmp_path):
    return tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 8), updates=1, ema_start_iters=None)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.5, 0.999])
def test_gradients_below_the_quantile_of_all_of_them_become_zero(share):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((40, 5), (3, 4, 5), (7, 1))]
    for scale, parameter in enumerate(parameters, 1):
        parameter.grad = scale * torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    least = torch.quantile(torch.cat([gradient.abs().flatten() for gradient in before]), 1 - share)
    keep_largest([*parameters, nn.Parameter(torch.zeros(2))], share)
    for parameter, gradient in zip(parameters, before, strict=True):
        assert torch.equal(parameter.grad, gradient * (gradient.abs() >= least))


@pytest.mark.integration
@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_keeps_the_largest_gradients_of_its_matrices(settings, steps):
    """Lion moves no weight that has no gradient, and without decay nothing else does."""
    given = settings | {"optimizer": "lion", "weight_decay": 0.0, "lr": 0.5, "grad_accum_steps": steps}
    train_here(given | {"gradient_topk": 0.25, "gradient_topk_pattern": r"generator\.0"})
    torch.manual_seed(0)
    start = Denoiser(make_config(TinyConfig, given)).build()["generator"].state_dict()
    moved = {name: (tensor != start[name]).float().mean().item() for name, tensor in load_weights(given).items()}
    assert moved["0.weight"] == 0.25
    assert moved["0.bias"] == moved["3.weight"] == moved["3.bias"] == 1


@pytest.mark.integration
def test_means_are_of_gradients_before_clipping_and_blocks_add_up(settings):
    keys = {"grad_mean_groups": {"weights": r"weight$", "last": r"3\.weight"}, "grad_mean_per_block": True}
    _, (line,) = train_here(settings | keys | {"dropout": 0.0}, WithBlocks)
    _, (clipped,) = train_here(
        settings | keys | {"dropout": 0.0, "clip_grad_norm": 1e-6, "experiment_id": "clipped"}, WithBlocks
    )
    means = {name.removeprefix("grad_mean/"): value for name, value in line.items() if name.startswith("grad_mean/")}
    assert means.keys() == {"weights", "weights/generator.0", "weights/generator.3", "last", "last/generator.3"}
    assert means["weights"] == pytest.approx(means["weights/generator.0"] + means["weights/generator.3"])
    assert means["last"] == means["last/generator.3"] == means["weights/generator.3"] > 0
    assert {name: clipped[f"grad_mean/{name}"] for name in means} == means


def test_the_mean_of_each_weight_counts_once_however_large_it_is():
    small, large = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(10, 10))
    small.grad, large.grad = torch.full((2, 2), -3.0), torch.full((10, 10), 1.0)
    named = {"net.a": small, "net.b": large, "net.c": nn.Parameter(torch.zeros(3))}
    assert gradient_means(mean_groups(named, {"all": ".", "c": "c$"})) == {"all": 4.0, "c": 0.0}


def test_norms_of_weights_in_bfloat16_have_more_digits_than_they():
    weights = {"net.a": torch.ones(1000), "net.b": torch.ones(10, 33), "other.c": torch.full((7,), 2.0)}
    found = weight_norms({name: one.bfloat16() for name, one in weights.items()})
    assert found == pytest.approx({"weight_norm/net": 1330**0.5, "weight_norm/other": 28**0.5}, rel=1e-6)


@pytest.mark.integration
def test_the_norm_of_the_trained_weights_comes_with_each_checkpoint(settings):
    given = settings | {"weight_norm": True, "updates": 3, "save_every": 2}
    given |= {"parameter_groups": [{"pattern": "3.*", "frozen": True}]}
    _, lines = train_here(given)
    assert ["weight_norm/generator" in line for line in lines] == [False, True, True]
    weights = load_weights(given)
    norm = torch.cat([weights[name].flatten() for name in ("0.weight", "0.bias")]).norm().item()
    assert lines[-1]["weight_norm/generator"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"gradient_topk": 0.3, "gradient_topk_pattern": "attn1"},
            "gradient_topk_pattern: .attn1. finds no",
        ),
        (
            {"grad_mean_groups": {"qk": "to_q"}},
            "grad_mean_groups: qk: 'to_q' finds no parameter that is trained; near",
        ),
        ({"gradient_topk": 0.3, "use_fsdp": True, "fsdp_cpu_offload": True}, "needs them whole in one process"),
    ],
)
def test_what_finds_nothing_or_cannot_work_is_one_clear_error(settings, keys, told):
    with pytest.raises(UserError, match=told):
        train_here(settings | keys)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"gradient_topk_pattern": "a"}, "gradient_topk_pattern: only gradient_topk reads this"),
        ({"grad_mean_per_block": True}, "grad_mean_per_block: only grad_mean_groups reads this"),
        ({"gradient_topk": 1.5}, "gradient_topk: found 1.5"),
    ],
)
def test_a_key_without_the_one_that_it_belongs_to_is_an_error(keys, told, tmp_path):
    given = {key: value for key, value in tiny_settings(tmp_path, tmp_path).items() if key in Config.model_fields}
    with pytest.raises(ConfigError, match=told):
        make_config(Config, given | keys)


def _train(given: dict) -> None:
    assert WithBlocks(make_config(TinyConfig, given)).run() == 0


@pytest.mark.slow
@pytest.mark.integration
def test_two_sharded_processes_report_what_one_does(settings):
    given = settings | {"dropout": 0.0, "micro_batch_size": 2, "weight_norm": True, "grad_mean_per_block": True}
    given |= {"grad_mean_groups": {"weights": "weight$"}}
    train_here(given, WithBlocks)
    together = given | {"experiment_id": "together", "use_fsdp": True}
    launch_processes(2, _train, together)
    (line,), (other,) = read_metrics(given), read_metrics(together)
    for name in ("grad_mean/weights", "grad_mean/weights/generator.0", "weight_norm/generator"):
        assert other[name] == pytest.approx(line[name], rel=1e-4), name
