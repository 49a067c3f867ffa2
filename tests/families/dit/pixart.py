"""Small networks of PixArt-alpha: those of the golden cases, and a whole pipeline as diffusers writes it."""

from pathlib import Path

import diffusers
import torch
from torch import Tensor

from families.common.library_networks import LibraryNetwork, adapt
from families.dit.pixart_build import BLOCKS
from families.dit.pixart_names import library_tensors
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.dit.pixart_versions import numbers
from tests.families.common.tiny_t5 import write_t5, write_tokenizer
from tests.golden import load_case, weights_of

SMALL = numbers(2, 12, 2, 16, sample_size=4)


def golden_network(case: str) -> tuple[LibraryNetwork, dict, dict[str, Tensor]]:
    """The network of a case with its weights, the description of the case, and its tensors."""
    spec, tensors = load_case(f"opensora/{case}")
    own = {"interpolation_scale": 2, "use_additional_conditions": True} if "_ms_" in case else {}
    network = PixArtTransformer2DModel(8, **numbers(4, 12, 2, 16, sample_size=8, **own))
    network.load_state_dict(library_tensors(weights_of(spec, tensors)), strict=True)
    return adapt(network, BLOCKS).eval(), spec, tensors


def write_pixart(folder: Path, **others) -> Path:
    """A pipeline's folder, which is returned."""
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(**SMALL | others)
    vae = diffusers.AutoencoderKL(
        block_out_channels=[8, 8, 8, 8], down_block_types=["DownEncoderBlock2D"] * 4, norm_num_groups=4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=1, latent_channels=4, sample_size=32,
    )  # fmt: skip
    write_t5(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    from transformers import T5EncoderModel, T5Tokenizer

    diffusers.PixArtAlphaPipeline(
        T5Tokenizer.from_pretrained(folder / "tokenizer"), T5EncoderModel.from_pretrained(folder / "text_encoder"),
        vae, network, diffusers.DDIMScheduler(
            beta_schedule="linear", set_alpha_to_one=True, steps_offset=0, clip_sample=False,
        ),
    ).save_pretrained(folder)  # fmt: skip
    return folder
