"""The small networks of NOVA's golden cases."""

from typing import Any

from torch import Tensor

from modules.nova import NOVATransformer
from tests.golden import load_case, weights_of


def load_nova(case: str) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The calls of a case by name, and its tensors."""
    spec, tensors = load_case(f"nova/{case}")
    return {call["name"]: call for call in spec["calls"]}, tensors


def golden_nova(case: str) -> NOVATransformer:
    """The network of a case, or of the case that it takes its weights from."""
    spec, tensors = load_case(f"nova/{case}")
    if "model_of_case" in spec["weights"]:
        return golden_nova(spec["weights"]["model_of_case"])
    network = NOVATransformer(**spec["constructor"])
    network.load_state_dict(weights_of(spec, tensors))
    return network
