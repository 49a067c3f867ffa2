"""What the benchmark of updates counts and compares."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import forward_flops
from benchmarks.techniques import Technique
from benchmarks.train_step import Case, autocast, inputs_of, make_ours, make_theirs, turn, update_flops
from modules.stage_b import StageB
from modules.stage_c import StageC

CPU = torch.device("cpu")
C = {
    "c_cond": 48, "c_hidden": [32, 64], "nhead": [2, 4], "blocks": [[1, 2], [2, 1]], "dropout": 0.0,
    "switch_level": [True], "level_config": ["CT", "CTAF"], "block_repeat": [[1, 1], [1, 2]],
}  # fmt: skip
B = {
    "c_cond": 48, "c_hidden": [16, 32, 32], "nhead": [-1, -1, 2], "blocks": [[1, 1, 2], [2, 1, 1]],
    "block_repeat": [[1, 1, 1], [3, 2, 1]], "level_config": ["CT", "CT", "CTA"], "self_attn": [True, True, False],
}  # fmt: skip

UNIFORM = {"c_cond": 48, "c_hidden": [32, 32], "nhead": [2, 2], "blocks": [[1, 2], [2, 1]], "dropout": 0.0}


@pytest.mark.parametrize(
    ("stage", "arguments", "px"), [(StageC, C, 512), (StageC, C | {"patch_size": 2}, 512), (StageB, B, 128)]
)
def test_the_formula_counts_what_pytorch_counts(stage, arguments, px):
    case = Case(stage, arguments, "small", "full", px, batch=2)
    network = stage(**arguments)
    given, target = inputs_of(case, CPU)
    with sdpa_kernel(SDPBackend.MATH):  # the counter does not know the CPU's attention kernel
        with FlopCounterMode(display=False) as forward:
            output = network(**given)
        with FlopCounterMode(display=False) as backward:
            (output - target).square().mean().backward()
    # Black pixels are mapped once for all samples.
    assert forward.get_total_flops() == pytest.approx(2 * forward_flops(network, case.positions), rel=1e-3)
    products = [
        sum(v for op, v in c.get_flop_counts()["Global"].items() if "mm" in str(op)) for c in (forward, backward)
    ]
    # Twice as much in the backward pass, but that inputs get no gradient; grouped convolutions it counts otherwise.
    assert 1.5 < products[1] / products[0] <= 2
    assert update_flops(case, network) == 2 * 3 * forward_flops(network, case.positions)


@pytest.mark.integration
@pytest.mark.parametrize(
    "trained", ["full", *(pytest.param(name, marks=pytest.mark.slow) for name in ("LoRA", "ControlNet"))]
)
def test_contenders_make_updates(trained):
    case = Case(StageC, UNIFORM, "small", trained, 256, batch=1)
    made = {"ours": lambda: make_ours(case, Technique(compiled=False), CPU)}
    if trained != "ControlNet":
        made["plain AdamW"] = lambda: make_ours(case, Technique(compiled=False, fused_optimizer=False), CPU)
        made["fused"] = lambda: make_ours(case, Technique(compiled=False, optimizer="came", fused_backward=True), CPU)
        made["theirs"] = lambda: make_theirs(case, CPU)
    for make in made.values():
        contender = make()
        parameters = [t for t in contender.there if isinstance(t, torch.nn.Parameter) and t.requires_grad]
        before = [p.detach().clone() for p in parameters]
        contender.update()
        assert any(not torch.equal(p, old) for p, old in zip(parameters, before, strict=True))
        seconds, memory = turn(make, 1, CPU)
        assert len(seconds) == 1
        assert memory > sum(p.nbytes for p in parameters)


@pytest.mark.slow
@pytest.mark.parametrize("trained", ["full", "LoRA"])
def test_a_network_that_is_compiled_as_a_whole_makes_the_same_updates(trained):
    least = UNIFORM | {"c_hidden": [32], "nhead": [2], "blocks": [[1], [1]]}
    case, weights = Case(StageC, least, "small", trained, 256, batch=1), []
    for whole in (None, {"backend": "aot_eager"}):
        torch.manual_seed(0)
        contender = make_ours(case, Technique(compiled=False, whole=whole), CPU)
        for _ in range(2):
            contender.update()
        weights.append([t.detach() for t in contender.there if isinstance(t, torch.nn.Parameter)])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_on_a_cpu_nothing_is_rounded():
    with autocast(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
