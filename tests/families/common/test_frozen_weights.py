"""Every LoRA script trains beside a base in eight bits, on one process or two, and the planner counts it."""

import pytest
import torch

from families.cascade import versions
from families.common.precision import freeze
from modules.float8 import FORMATS
from modules.packed import PackedLinear
from modules.quantise import BLOCK
from tests.many_processes import launch_processes
from tests.tiers import represented_by
from tests.train.test_every_script import (
    SETTINGS,
    member,
    settings,  # noqa: F401
    settings_for_two,
    train,
    use_case,
)
from tests.warpcore.runs import numbers, read_metrics
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.rehearsal import OnShapes, bucket_sizes

pytestmark = pytest.mark.integration
TOO_NARROW = {"train_cosmos_lora"}
"""Scripts whose mini here has no layers that are multiplied in float8."""
LORAS = [name for name in SETTINGS if "frozen_weights" in use_case(name).Config.model_fields]


@pytest.mark.parametrize("name", represented_by("train_cosmos_lora", of=LORAS))
@pytest.mark.parametrize(
    "dtype",
    ["float8_e4m3fn", "int8",
     *(pytest.param(one, marks=pytest.mark.slow) for one in ("float8_e5m2", "float8", "int8_rotated"))],
)  # fmt: skip
def test_a_lora_learns_beside_a_base_in_eight_bits_and_resumes_exactly(settings, name, dtype):  # noqa: F811
    if dtype == "float8" and name in TOO_NARROW:
        pytest.skip("its mini has no sides that 16 divides")
    plain = settings(name, "plain", dtype="bfloat16")
    whole = plain | {"experiment_id": "whole", "frozen_weights": dtype}
    packed = []

    class Seen(use_case(name)):
        def make_networks(self, saved=None):
            super().make_networks(saved)
            layers = [layer for layer in self.networks["generator"].modules() if isinstance(layer, PackedLinear)]
            packed.append([layer.stored.dtype for layer in layers])

    lines, expected = train(name, whole, Seen), train(name, plain)
    assert set(packed[0]) == {{**FORMATS, "float8": torch.float8_e4m3fn}.get(dtype, torch.int8)}
    assert len(packed[0]) > 10
    for line, other in zip(lines, expected, strict=True):
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=0.1)
        assert line["grad_norm"] > 0
    halves = whole | {"experiment_id": "halves"}
    train(name, halves | {"updates": 2})
    assert numbers(train(name, halves)) == numbers(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", LORAS)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8", "int8_rotated"])
def test_it_is_sharded_over_two_processes(settings, name, dtype, tmp_path):  # noqa: F811
    if dtype == "float8" and name in TOO_NARROW:
        pytest.skip("its mini has no sides that 16 divides")
    alone = settings_for_two(settings, name, tmp_path) | {"updates": 4, "frozen_weights": dtype}
    expected = train(name, alone)
    together = alone | {"experiment_id": "together", "use_fsdp": True}
    launch_processes(2, member, name, together | {"updates": 2}, versions.VERSIONS["mini"])
    train(name, together)
    for line, other in zip(read_metrics(together), expected, strict=True):  # they compute in bfloat16
        assert line["samples_hash"] == other["samples_hash"]
        assert line["loss"] == pytest.approx(other["loss"], rel=2e-3)


@pytest.mark.parametrize("name", represented_by("train_cosmos_lora", of=LORAS))
def test_the_planner_counts_eight_bits(settings, name):  # noqa: F811
    counted, spared = {}, {}
    for dtype in ("bfloat16", "float8_e5m2", "int8", *([] if name in TOO_NARROW else ["float8"])):
        config = make_config(use_case(name).Config, settings(name, "planned", frozen_weights=dtype, batch_size=2))
        with OnShapes(use_case(name), config, "cpu") as shapes:
            counted[dtype] = shapes.needs(bucket_sizes(shapes.run)[0], 2).frozen
            layers = [one for one in shapes.run.networks["generator"].modules() if isinstance(one, PackedLinear)]
            spared[dtype] = sum(one.out_features * (one.in_features - 2) for one in layers)  # two bytes for a scale
    assert spared["float8_e5m2"] >= spared["int8"] >= spared.get("float8", 1) > 0
    assert {dtype: counted["bfloat16"] - found for dtype, found in counted.items()} == spared


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("train_cosmos", "text_encoder_precision"),
        pytest.param("train_sd", "text_encoder_precision", marks=pytest.mark.slow),
        pytest.param("train_cosmos_lora", "frozen_weights", marks=pytest.mark.slow),
    ],
)
def test_the_planner_counts_four_bits(settings, name, key):  # noqa: F811
    pytest.importorskip("torchao.quantization", reason="an optional package")
    given = {"batch_size": 2, "model_version": "mini", "generator_checkpoint_path": None}
    counted, activations, packed = {}, {}, []
    for precision in ("bfloat16", "nf4"):
        config = make_config(use_case(name).Config, settings(name, "planned", **given | {key: precision}))
        with OnShapes(use_case(name), config, "cpu") as shapes:
            needs = shapes.needs(bucket_sizes(shapes.run)[0], 2)
            counted[precision], activations[precision] = needs.frozen, needs.activations
            parameters = [p for network in shapes.run.networks.values() for p in network.parameters()]
            packed = [p.numel() for p in parameters if type(p.data) not in (torch.Tensor, torch.nn.Parameter)]
    assert packed
    # Half a byte for each number, one for 64, two for 64 * 256; 16 values and a mean in bfloat16 for each matrix.
    expected = sum(n // 2 + n // 64 + 2 * n // BLOCK + 34 for n in packed)
    assert counted["bfloat16"] - counted["nf4"] == 2 * sum(packed) - expected
    # Of the others, one matrix at a time is unpacked, by way of indices.
    assert activations["nf4"] < activations["bfloat16"] + 12 * max(packed)


def test_where_there_are_no_eight_bit_numbers_an_error_says_what_to_write():
    with pytest.raises(UserError, match="frozen_weights: MPS has no float8_e5m2; write bfloat16 or nf4"):
        freeze(torch.nn.Linear(2, 2), "float8_e5m2", "frozen_weights", "mps")
