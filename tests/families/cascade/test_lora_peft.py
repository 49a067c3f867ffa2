"""peft's folders, as peft writes them: its patterns are read by its rules, and what has no place here is refused."""

import json

import peft
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from safetensors.torch import load_file, save_file

from families.cascade.lora_files import read_lora, write_lora
from families.cascade.lora_formats import LoraFileError
from families.common.lora import merge_loras
from families.common.lora_training import lora_of
from modules.lora import LoraSettings, add_adapters
from tests.golden import load_case, weights_of
from tests.modules.test_lora import randomised
from tests.modules.test_stage_c import golden_model, small_inputs
from tests.train.test_train_c import diffusers_network

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "channelwise.0", "clf.1"]


def of_peft(folder, **settings) -> torch.nn.Module:
    """A network of peft's with random adapters, saved in a folder."""
    spec, tensors = load_case("stage_c_small")
    network = diffusers_network(spec["constructor"]).eval()
    network.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights_of(spec, tensors)))
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS} | settings)
    torch.manual_seed(0)
    network = peft.get_peft_model(network, config).eval()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"alpha_pattern": {"to_q": 24, "channelwise.0": 1}},
        {"rank_pattern": {"to_v": 5, "up_blocks.*to_k": 2}, "alpha_pattern": {r"down_blocks\.\d+.*\.to_(k|v)": 12}},
        {"alpha_pattern": {r"^down_blocks\.1\.2\.attention\.to_out\.0": 30, "clf.1": 9}},
    ],
    ids=["plain", "rank-stabilised", "DoRA", "suffixes", "regular expressions", "whole names"],
)
def test_a_folder_of_pefts_draws_here_as_it_does_there(settings, tmp_path):
    theirs, ours = of_peft(tmp_path, **settings), golden_model("stage_c_small")[0]
    inputs = small_inputs()
    with torch.no_grad():
        untouched = ours(**inputs)
        merge_loras(ours, [(read_lora(tmp_path, ours), 1.0)])
        output = ours(**inputs)
        order = (inputs.pop("x"), inputs.pop("r"))
        torch.testing.assert_close(output, theirs(*order, **inputs, return_dict=False)[0], rtol=1e-4, atol=1e-4)
    assert (output - untouched).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft's own, about the shape of biases
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_bias": True}, "trained with lora_bias: True"),
        ({"bias": "lora_only"}, "trained with bias lora_only"),
        ({"bias": "all"}, "trained with bias all"),
        ({"modules_to_save": ["clip_img_mapper"]}, r"trained with modules_to_save: \['clip_img_mapper'\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_peft_trains_beside_lora_is_refused_by_name(settings, said, tmp_path):
    of_peft(tmp_path, **settings)
    with pytest.raises(LoraFileError, match=said):
        read_lora(tmp_path, golden_model("stage_c_small")[0])


def test_a_tensor_or_a_config_that_does_not_fit_the_other_is_refused(tmp_path):
    of_peft(tmp_path)
    network, file, config = golden_model("stage_c_small")[0], tmp_path / "adapter_model.safetensors", {}
    tensors, config = load_file(file), json.loads((tmp_path / "adapter_config.json").read_text())
    for change, said in (
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa_niter_4 changed the base too"),
        ({"peft_type": "LOHA"}, "peft_type LOHA: only LORA is read"),
        ({"r": 4}, "has rank 3, but adapter_config.json says 4"),
        ({"use_dora": True}, "use_dora, but .* has no lora_magnitude_vector"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(LoraFileError, match=said):
            read_lora(tmp_path, network)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors | {"base_model.model.clf.1.bias": torch.zeros(64)}, file)
    with pytest.raises(LoraFileError, match=r"base_model\.model\.clf\.1\.bias, which belongs to no adapter"):
        read_lora(tmp_path, network)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoraFileError, match=r"adapter_config.json cannot be read"):
        read_lora(tmp_path, network)


def test_peft_reads_the_ranks_and_alphas_of_a_folder_of_ours(tmp_path):
    network, (plain, _, _) = golden_model("stage_c_small")[0], golden_model("stage_c_small")
    for filters, settings in (([".attn"], LoraSettings(rank=3, alpha=2)), (["clf.1"], LoraSettings(rank=2, alpha=7))):
        add_adapters(network, filters, settings)
    lora = lora_of(randomised(network))
    write_lora(lora, tmp_path, "peft")
    spec, tensors = load_case("stage_c_small")
    theirs = diffusers_network(spec["constructor"]).eval()
    theirs.load_state_dict(convert_stable_cascade_unet_single_file_to_diffusers(weights_of(spec, tensors)))
    loaded, inputs = peft.PeftModel.from_pretrained(theirs, tmp_path), small_inputs()
    with torch.no_grad():
        merge_loras(plain, [(lora, 1.0)])
        expected = plain(**inputs)
        order = (inputs.pop("x"), inputs.pop("r"))
        torch.testing.assert_close(loaded(*order, **inputs, return_dict=False)[0], expected, rtol=1e-4, atol=1e-4)
