"""What is written has the names and shapes by which ComfyUI and A1111 recognise a checkpoint.

The rules are those of ComfyUI's `model_detection.py` and `supported_models.py`, and of A1111's
`sd_models_config.py` and `sd_models.py`, written down for shapes of the full size, without memory.
"""

import re

import pytest
import torch

from families.stable_diffusion.single_file import Version, single_file_tensors
from tests.families.stable_diffusion.test_original_names import published

PARTS = {
    "sd15": {"unet": "sd15_unet", "vae": "sd_vae", "text_encoder": "clip_l_text"},
    "sdxl": {
        "unet": "sdxl_unet", "vae": "sdxl_vae", "text_encoder": "clip_l_text", "text_encoder_2": "clip_bigg_text",
    },
}  # fmt: skip
UNET = "model.diffusion_model."
COMFYUI = {
    "sd15": {
        "model_channels": 320, "in_channels": 4, "use_linear_in_transformer": False, "context_dim": 768,
        "adm_in_channels": None, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth_middle": 1,
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    },
    "sdxl": {
        "model_channels": 320, "in_channels": 4, "use_linear_in_transformer": True, "context_dim": 2048,
        "adm_in_channels": 2816, "transformer_depth": [0, 0, 2, 2, 10, 10], "channel_mult": [1, 2, 4],
        "num_res_blocks": [2, 2, 2], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    },
}  # fmt: skip
"""The U-Net configs of ComfyUI's classes SD15 and SDXL."""


def written(version: Version, **marks) -> dict[str, torch.Tensor]:
    return single_file_tensors({name: published(own) for name, own in PARTS[version].items()}, version, **marks)


def unet_config(tensors: dict[str, torch.Tensor]) -> dict:
    """What ComfyUI's `detect_unet_config` finds out about a U-Net."""
    own = {name.removeprefix(UNET): tensor.shape for name, tensor in tensors.items() if name.startswith(UNET)}

    def depth(block: str) -> int:
        return len({match[1] for name in own if (match := re.match(rf"{block}\.transformer_blocks\.(\d+)\.", name))})

    found = {
        "model_channels": own["input_blocks.0.0.weight"][0], "in_channels": own["input_blocks.0.0.weight"][1],
        "adm_in_channels": own["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in own else None,
        "transformer_depth": [], "transformer_depth_output": [], "channel_mult": [], "num_res_blocks": [],
        "transformer_depth_middle": depth(r"middle_block\.1"),
    }  # fmt: skip
    count = 0
    last_channels = 1
    blocks = len({match[1] for name in own if (match := re.match(r"input_blocks\.(\d+)\.", name))})
    for block in range(1, blocks):
        if f"input_blocks.{block}.0.op.weight" in own:
            found["num_res_blocks"].append(count)
            found["channel_mult"].append(last_channels)
            count = 0
            continue
        count += 1
        last_channels = own[f"input_blocks.{block}.0.out_layers.3.weight"][0] // found["model_channels"]
        found["transformer_depth"].append(depth(rf"input_blocks\.{block}\.1"))
        if projection := own.get(f"input_blocks.{block}.1.proj_in.weight"):
            found["use_linear_in_transformer"] = len(projection) == 2
            context = own[f"input_blocks.{block}.1.transformer_blocks.0.attn2.to_k.weight"][1]
            found["context_dim"] = context
    found["num_res_blocks"].append(count)
    found["channel_mult"].append(last_channels)
    outputs = len({match[1] for name in own if (match := re.match(r"output_blocks\.(\d+)\.", name))})
    found["transformer_depth_output"] = [depth(rf"output_blocks\.{block}\.1") for block in range(outputs)][::-1]
    return found


@pytest.mark.parametrize("version", PARTS)
def test_comfyui_detects_the_u_net(version):
    assert unet_config(written(version)) == COMFYUI[version]


def test_a1111_takes_a_file_of_stable_diffusion_1_for_what_it_is():
    """Its config is chosen by the first of these that is there; without any, it is that of Stable Diffusion 1."""
    tensors = written("sd15")
    for other in (
        "conditioner.embedders.1.model.ln_final.weight",  # SDXL
        "conditioner.embedders.0.model.ln_final.weight",  # its refiner
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",  # Stable Diffusion 2
        "depth_model.model.pretrained.act_postprocess3.0.project.0.bias",
        "cond_stage_model.roberta.embeddings.word_embeddings.weight",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    ):
        assert other not in tensors
    assert tensors["model.diffusion_model.input_blocks.0.0.weight"].shape[1] == 4  # 9 inpaints, 8 edits
    clip = "cond_stage_model.transformer.text_model."
    assert tensors[f"{clip}embeddings.token_embedding.weight"].shape == (49408, 768)
    assert tensors[f"{clip}final_layer_norm.weight"].shape == (768,)
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert len(tensors) == 686 + 248 + 196
    assert {name.split(".")[0] for name in tensors} == {"model", "first_stage_model", "cond_stage_model"}


def test_a1111_and_comfyui_take_a_file_of_sdxl_for_what_it_is():
    tensors = written("sdxl")
    second = "conditioner.embedders.1.model."
    assert tensors[f"{second}ln_final.weight"].shape == (1280,)
    assert tensors[f"{second}text_projection"].shape == (1280, 1280)
    assert tensors[f"{second}positional_embedding"].shape == (77, 1280)
    assert tensors[f"{second}transformer.resblocks.31.attn.in_proj_weight"].shape == (3840, 1280)
    assert f"{second}transformer.resblocks.32.ln_1.weight" not in tensors
    assert tensors["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"].shape[1] == 768
    assert tensors["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, 2816)
    # sd_xl_base_1.0.safetensors has 2,515 tensors: these, a logit_scale and position_ids.
    assert len(tensors) == 2515 - 2


@pytest.mark.parametrize(("version", "marks", "expected"), [
    ("sdxl", {}, set()),
    ("sdxl", {"target": "v"}, {"v_pred"}),
    ("sdxl", {"target": "v", "zero_terminal_snr": True}, {"v_pred", "ztsnr"}),
    ("sd15", {"target": "v", "zero_terminal_snr": True}, set()),
])  # fmt: skip
def test_files_of_sdxl_say_that_their_network_predicts_v(version, marks, expected):
    tensors = written(version, **marks)
    assert {"v_pred", "ztsnr"} & tensors.keys() == expected
