"""diffusers' networks and peft's adapters, as their training examples use them: what ours is measured beside."""

import torch
from diffusers import StableCascadeUNet
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from families.cascade.diffusers_folder import unet_config
from modules.unet import UNet

NAMES = {"x": "sample", "r": "timestep_ratio", "clip": "clip_text_pooled"}


def diffusers_network(stage: type[UNet], arguments: dict) -> StableCascadeUNet:
    """diffusers' network of the size of ours; ours starts as random as theirs."""
    return StableCascadeUNet(**unet_config(stage, arguments))


def diffusers_lora(network: StableCascadeUNet, frozen: torch.dtype) -> nn.Module:
    """The network frozen, with float32 adapters of rank 4 on its attention layers."""
    network.requires_grad_(False).to(frozen)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def diffusers_output(network: StableCascadeUNet, given: dict[str, Tensor]) -> Tensor:
    """What it predicts for the inputs of ours."""
    return network(**{NAMES.get(name, name): value for name, value in given.items()}, return_dict=False)[0]
