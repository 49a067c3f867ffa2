"""The networks whose golden weights are rounded, beside the outputs that the reference gave for the exact ones."""

import pytest
import torch

from modules.stage_b import StageB
from modules.stage_c import StageC
from tests.golden import ROUNDING, load_case, reference_outputs, relative_error, resolve, weights_of

CASES = {"stage_c_small": StageC, "stage_c_variants": StageC, "stage_b_small": StageB}


@pytest.mark.parametrize("case", CASES)
def test_rounded_weights_give_what_the_reference_gave_but_for_rounding(case):
    spec, tensors = load_case(case)
    network = CASES[case](**spec["constructor"]).eval()
    network.load_state_dict(weights_of(spec, tensors), strict=True)
    calls = {call["name"]: call for call in spec["calls"]}
    expected = {key.partition("/")[2]: one for key, one in reference_outputs().items() if key.startswith(f"{case}/")}
    assert len(expected) >= 3
    for name, reference in expected.items():
        with torch.no_grad():
            found = getattr(network, calls[name]["method"])(**resolve(calls[name]["kwargs"], tensors))
        assert relative_error(found, reference) < ROUNDING, name
