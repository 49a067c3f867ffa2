"""An adapted U-Net computes what plain diffusers does, at every level and compiled, under the library's names."""

import copy
import shutil
from functools import partial

import pytest
import torch
from diffusers import UNet2DConditionModel

from families.common.library_networks import adapt
from tests.families.common.tiny_unets import SD15, SDXL, inputs, library_call, unet
from warpcore.networks import is_whole
from warpcore.offload import keep_inputs_on_cpu

LAYOUTS = {"SD 1.5": SD15, "SDXL": SDXL}


def gradients(network, output: torch.Tensor) -> dict[str, torch.Tensor]:
    network.zero_grad()
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_diffusers_at_every_level(layout):
    config = LAYOUTS[layout]
    plain, given = unet(config).train(), inputs(config)
    expected = library_call(plain, given)
    expected_gradients = gradients(plain, expected)
    network, kept = adapt(unet(config).train()), []
    for level in (0, 1, 2, 3):
        network.set_activation_checkpointing(level)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            output = network(**given)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
        kept.append(sum(sizes))
        if level in (0, 3):
            assert_same(gradients(network, output), expected_gradients)
    assert kept == sorted(set(kept), reverse=True)  # each level keeps less than the one before
    with pytest.raises(ValueError, match="level 4 does not exist"):
        network.set_activation_checkpointing(4)


def test_inputs_of_blocks_that_are_called_with_keywords_wait_on_the_cpu():
    networks = [adapt(unet(SDXL).train()) for _ in range(2)]
    keep_inputs_on_cpu(networks[0])
    found = []
    for network in networks:
        network.set_activation_checkpointing(3)
        found.append(gradients(network, network(**inputs(SDXL))))
    assert_same(*found)


@pytest.mark.integration
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled_blocks_compute_the_same(backend, monkeypatch):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, given = unet(SDXL).train(), inputs(SDXL)
    expected = library_call(plain, given)
    network = adapt(unet(SDXL).train())
    network.set_activation_checkpointing(1)
    network.compile_blocks()
    output = network(**given)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
    assert_same(gradients(network, output), gradients(plain, expected))


def test_blocks_are_the_innermost_of_those_that_the_library_names():
    network = adapt(unet(SDXL))
    kinds = [type(block).__name__ for block in network.blocks]
    assert sorted(set(kinds)) == ["BasicTransformerBlock", "ResnetBlock2D"]
    assert kinds.count("BasicTransformerBlock") == 2 + 2 + 2 * 2
    assert {block.wide for block in network.blocks if type(block).__name__ == "ResnetBlock2D"} == {False}
    assert [type(block).__name__ for block in adapt(unet(SD15), ["Transformer2DModel"]).blocks] == [
        "Transformer2DModel"
    ] * 4
    with pytest.raises(ValueError, match="Linear has no blocks"):
        adapt(torch.nn.Linear(2, 2))


def test_names_files_and_pipelines_stay_the_librarys(tmp_path):
    plain, network = unet(SDXL), adapt(unet(SDXL))
    assert list(network.state_dict()) == list(plain.state_dict())
    network.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert type(again) is UNet2DConditionModel
    given = inputs(SDXL)
    with torch.no_grad():
        expected = library_call(plain, given)
        torch.testing.assert_close(library_call(again, given), expected)
        torch.testing.assert_close(library_call(network, given), expected)  # as a pipeline calls it
        other = adapt(unet(SDXL, seed=5))
        other.load_state_dict(plain.state_dict(), strict=True)
        torch.testing.assert_close(other(**given), expected)
        torch.testing.assert_close(copy.deepcopy(other)(**given), expected)


def test_conditions_are_named_and_unknown_ones_refused():
    small, large = adapt(unet(SD15)), adapt(unet(SDXL))
    assert "encoder_hidden_states" in small.conditions
    assert set(large.conditions) - set(small.conditions) == {"text_embeds", "time_ids"}
    given = inputs(SDXL)
    with pytest.raises(ValueError, match="no condition named text_embeds, time_ids; it takes encoder_hidden_states"):
        small(**given)  # diffusers takes these and ignores them
    with pytest.raises(ValueError, match="no condition named class_labels"):
        large(**given, class_labels=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="no condition named clip_text"):
        large(**given, clip_text=given["text_embeds"])


def test_a_bfloat16_network_takes_float32_inputs_and_keeps_times_exact():
    network, given = adapt(unet(SDXL)).to(torch.bfloat16), inputs(SDXL)
    with torch.no_grad():
        output = network(**given)
        torch.testing.assert_close(output.float(), library_call(unet(SDXL), given), rtol=0.1, atol=0.1)
        assert not torch.equal(output, network(**given | {"times": torch.tensor([3.0, 701.5])}))
    assert output.dtype == torch.bfloat16


def test_an_adapted_network_has_all_that_the_engine_can_ask_of_one():
    assert is_whole(adapt(unet(SD15)))
    assert not is_whole(unet(SD15))
