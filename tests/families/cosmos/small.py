"""Small denoisers of the golden cases, as the engine has them."""

from torch import Tensor

from families.common.library_networks import LibraryNetwork, adapt
from families.cosmos.original_names import library_tensors
from families.cosmos.transformer import CosmosTransformer3DModel
from tests.golden import load_case, weights_of

TEXT = "encoder_hidden_states"


def constructor(spec: dict) -> dict:
    """diffusers' constructor numbers of a case."""
    if "same_in_diffusers" in spec:
        return spec["same_in_diffusers"]["constructor"]
    return load_case("cosmos/dit_small")[0]["same_in_diffusers"]["constructor"]  # they are of one size


def golden_network(case: str) -> tuple[LibraryNetwork, dict, dict[str, Tensor]]:
    """The network of a case with its weights, the description of the case, and its tensors."""
    spec, tensors = load_case(f"cosmos/{case}")
    network = CosmosTransformer3DModel(**constructor(spec))
    network.load_state_dict(library_tensors(weights_of(spec, tensors)), strict=True)
    return adapt(network).eval(), spec, tensors
