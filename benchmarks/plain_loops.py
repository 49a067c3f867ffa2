"""The families beside the Stable Cascade in `benchmarks/family_step.py`: random networks, and the plain loop of each.

A row for another family is an entry in `FAMILIES`: its script, its cases, what writes its networks, and what the loop
of a library's training example computes.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.plain_nova import nova_loop, nova_use_case, write_nova
from benchmarks.plain_stdit import plain_stdit, stdit_loop
from families.common.features import lengths_name, stored, stored_name
from families.common.training import DiffusionTraining
from warpcore.data.reader import Batch
from warpcore.rehearsal import made_up_batch

Loss = Callable[[], Tensor]
EXAMPLE_LR = 1e-5


@dataclass(frozen=True)
class Case:
    """A network, the size of its pictures and a batch."""

    name: str
    version: str
    """`model_version`."""
    image_px: int
    batch: int
    changes: Mapping = field(default_factory=dict)
    """Other constructor numbers of the network."""
    num_frames: int | None = None
    """Of clips; None of pictures."""

    @property
    def keys(self) -> dict[str, str | int]:
        """Those of a training."""
        of_clips = {} if self.num_frames is None else {"num_frames": self.num_frames}
        return {"batch_size": self.batch, "image_size": self.image_px, "model_version": self.version} | of_clips

    def __str__(self) -> str:
        return f"{self.name} {self.image_px} px, batch {self.batch}"


@dataclass(frozen=True)
class Family:
    """A training script, and the plain loop beside it."""

    use_case: Callable[[], type[DiffusionTraining]]
    """Imports the script."""
    on_gpu: tuple[Case, ...]
    on_cpu: tuple[Case, ...]
    write: Callable[[Case, Path, torch.device], dict[str, str]]
    """Writes random networks to a folder; the keys of training that name them."""
    plain_loop: Callable[[DiffusionTraining, Batch, Path], tuple[nn.Module, Loss]]
    """The library's network of that folder, and what computes its loss of a batch of features, as the example does."""
    batch: Callable[[DiffusionTraining, Case], Batch] = lambda run, case: made_up_batch(run, _size(case), case.batch)
    """Pictures, and what else of the samples is a feature of a cache in every contender."""
    undropped: Mapping = field(default_factory=lambda: {"caption_dropout": 0.0})
    """Keys of a training that drops no condition, as the plain loop does not."""
    caches_texts: bool = False
    """Whether texts always come from a cache: T5 has 5 billion parameters."""

    def contender(self) -> type[DiffusionTraining]:
        """The script, without a text encoder where texts come from a cache."""
        kind = self.use_case()
        if not self.caches_texts:
            return kind

        class FromCachedTexts(kind):
            def needs_encoder(self, name: str) -> bool:
                return name != "text" and super().needs_encoder(name)

        return FromCachedTexts


def _size(case: Case) -> tuple[int, ...]:
    side = case.image_px
    return (side, side) if case.num_frames is None else (case.num_frames, side, side)


# ---------------------------------------------------------------- Stable Diffusion


def sd_use_case() -> type[DiffusionTraining]:
    from train.train_sd import TrainSd

    return TrainSd


def write_sd(case: Case, folder: Path, device: torch.device) -> dict[str, str]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from families.stable_diffusion.versions import VERSIONS

    version = VERSIONS[case.version]
    with device:
        UNet2DConditionModel(**version.unet | dict(case.changes)).save_pretrained(folder / "unet")
    if case.version == "mini":
        return {"generator_checkpoint_path": str(folder / "unet"), "diffusion_target": "epsilon"}
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    AutoencoderKL(**version.autoencoder).save_pretrained(folder / "vae")
    for number, config in enumerate(version.text):
        kind = CLIPTextModelWithProjection if "Projection" in config["architectures"][0] else CLIPTextModel
        kind(CLIPTextConfig(**config)).save_pretrained(folder / ("text_encoder_2" if number else "text_encoder"))
    name = "StableDiffusionXLPipeline" if version.sees_sizes else "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}), encoding="utf-8")
    return {"generator_checkpoint_path": str(folder), "diffusion_target": "epsilon"}


def sd_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Loss]:
    """`examples/text_to_image` of diffusers: DDPMScheduler, mean squared error of the noise."""
    from diffusers import DDPMScheduler, UNet2DConditionModel

    network = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    conditions = run.conditions(batch, run.encoded(batch)[1])
    text = conditions.pop("encoder_hidden_states")
    moments, scale = stored(batch, "moments"), run.latents[0]

    def loss() -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = scale.apply(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=run.device)
        predicted = network(
            scheduler.add_noise(latents, noise, times), times, text, added_cond_kwargs=conditions or None,
            return_dict=False,
        )[0]  # fmt: skip
        return F.mse_loss(predicted.float(), noise.float())

    return network, loss


# ---------------------------------------------------------------- Cosmos-Predict2


def cosmos_use_case() -> type[DiffusionTraining]:
    from train.train_cosmos import TrainCosmos

    return TrainCosmos


def write_cosmos(case: Case, folder: Path, device: torch.device) -> dict[str, str]:
    from diffusers import AutoencoderKLWan, CosmosTransformer3DModel

    from families.cosmos.versions import VERSIONS

    version = VERSIONS[case.version]
    with device:
        CosmosTransformer3DModel(**version.transformer | dict(case.changes)).save_pretrained(folder / "transformer")
    if version.autoencoder is not None:
        AutoencoderKLWan(**version.autoencoder).save_pretrained(folder / "vae")
    (folder / "model_index.json").write_text('{"_class_name": "Cosmos2TextToImagePipeline"}', encoding="utf-8")
    return {"generator_checkpoint_path": str(folder)}


def with_texts(width: Callable[[DiffusionTraining], int], run: DiffusionTraining, case: Case) -> Batch:
    """Pictures with T5's states, of a width, of texts that are as long as they may be."""
    batch, version = made_up_batch(run, _size(case), case.batch), run.config.version
    text = torch.randn(case.batch, version.text_length, width(run))
    lengths = torch.full((case.batch,), version.text_length)
    return replace(batch, extra=batch.extra | {stored_name("text"): text, stored_name(lengths_name("text")): lengths})


def cosmos_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Loss]:
    """The loop of diffusers' examples that train a straight flow: logit-normal times, mean squared error."""
    from diffusers import CosmosTransformer3DModel

    network = CosmosTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    latents, text = stored(batch, "latents")[:, :, None], stored(batch, "text")
    mask = latents.new_zeros(1, 1, *latents.shape[-2:])

    def loss() -> Tensor:
        noise = torch.randn_like(latents)
        times = torch.randn(len(latents), device=run.device).sigmoid()
        share = times.view(-1, 1, 1, 1, 1)
        noised = (1 - share) * latents + share * noise
        predicted = network(noised, times, text, padding_mask=mask, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise - latents)

    return network, loss


# ---------------------------------------------------------------- DiT, Latte and PixArt-alpha


def dit_use_case() -> type[DiffusionTraining]:
    from train.train_dit import TrainDit

    return TrainDit


def latte_use_case() -> type[DiffusionTraining]:
    from train.train_latte import TrainLatte

    return TrainLatte


def pixart_use_case() -> type[DiffusionTraining]:
    from train.train_pixart import TrainPixart

    return TrainPixart


def stdit_use_case() -> type[DiffusionTraining]:
    from train.train_stdit import TrainStdit

    return TrainStdit


def write_clip_autoencoder(case: Case, folder: Path, device: torch.device) -> dict[str, str]:
    """The autoencoder of Open-Sora 1.2, or for the mini a small one of Wan's, with random weights."""
    from diffusers import AutoencoderKL

    from families.common.autoencoders import SD_AUTOENCODER
    from families.common.wan_training import TrainedWanAutoencoder, from_scratch
    from modules.open_sora_vae import OpenSoraAutoencoder, TemporalAutoencoder

    if case.version == "mini":
        made = TrainedWanAutoencoder(from_scratch(24, [1, 2, 3], 1, 16, 2))
        network, about = made.model, made.metadata_to_save()
    else:
        network, about = OpenSoraAutoencoder(AutoencoderKL(**SD_AUTOENCODER), TemporalAutoencoder()), None
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, folder / "vae.safetensors", about)
    return {"autoencoder_checkpoint_path": str(folder / "vae.safetensors")}


def write_autoencoder(case: Case, folder: Path, device: torch.device) -> dict[str, str]:
    """The autoencoder of the published sizes; the denoiser is the run's random one, in both contenders."""
    from diffusers import AutoencoderKL

    from families.dit.autoencoder import PUBLISHED

    if case.version.startswith("mini"):
        return {}
    AutoencoderKL(**PUBLISHED).save_pretrained(folder / "vae")
    return {"autoencoder_checkpoint_path": str(folder / "vae")}


def dit_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Loss]:
    """The published loop without the bound of the variance, and with our network: diffusers' predicts other noise, and
    it has none for Latte's classes."""
    network = copy.deepcopy(run.networks["generator"])
    return network, _noise_loss(run, batch, lambda noised, times: network(noised, times, y=batch.extra["class"]))


def older_stdit_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Loss]:
    """The published loop of Open-Sora 1.0 and 1.1, without the bound of the variance, with attention written out."""
    network, predict = plain_stdit(run, batch)
    return network, _noise_loss(run, batch, predict)


def pixart_loop(run: DiffusionTraining, batch: Batch, folder: Path) -> tuple[nn.Module, Loss]:
    """The loop of the published script for diffusers: DDPMScheduler, the error of the noise, none of the variance."""
    from diffusers import PixArtTransformer2DModel

    own, texts = run.networks["generator"], run.conditions(batch)
    numbers = {name: value for name, value in own.config.items() if not name.startswith("_")}
    network = PixArtTransformer2DModel(**numbers)
    network.load_state_dict({name: t for name, t in own.state_dict().items() if name != "y_embedding"})
    sizes = {name: texts.get(name) for name in ("resolution", "aspect_ratio")}
    text, mask = texts["encoder_hidden_states"], texts["encoder_attention_mask"]
    return network, _noise_loss(run, batch, lambda noised, times: network(
        noised, text, times, sizes, encoder_attention_mask=mask, return_dict=False,
    )[0])  # fmt: skip


def _noise_loss(run: DiffusionTraining, batch: Batch, predict: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The squared error of the noise, in the first half of the channels."""
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    moments, scale = stored(batch, "moments"), run.latents[0]

    def loss() -> Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        latents = scale.apply(mean + (0.5 * log_variance).exp() * torch.randn_like(mean))
        noise = torch.randn_like(latents)
        times = torch.randint(0, 1000, (len(latents),), device=run.device)
        predicted = predict(scheduler.add_noise(latents, noise, times), times)
        return F.mse_loss(predicted.chunk(2, dim=1)[0].float(), noise.float())

    return loss


_captioned = partial(
    Family, batch=partial(with_texts, lambda run: run.config.version.network["caption_channels"]), caches_texts=True
)
_stdit = partial(_captioned, stdit_use_case)

FAMILIES = {
    "sd": Family(
        sd_use_case,
        on_gpu=(Case("SD 1.5", "sd15", 512, 8), Case("SDXL", "sdxl", 1024, 2)),
        on_cpu=(
            Case("SD tiny", "mini", 128, 16),
            Case("SD small", "mini", 512, 2, {
                "block_out_channels": [128, 256, 256], "layers_per_block": 2, "attention_head_dim": 8,
                "norm_num_groups": 32, "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
            }),
        ),
        write=write_sd,
        plain_loop=sd_loop,
    ),
    "cosmos": Family(
        cosmos_use_case,
        on_gpu=(Case("Cosmos 2B", "2B", 1024, 2), Case("Cosmos 0.6B", "0.6B", 1024, 4)),
        on_cpu=(
            Case("Cosmos tiny", "mini", 128, 16),
            Case("Cosmos small", "mini", 512, 2, {"num_attention_heads": 8, "attention_head_dim": 64}),
        ),
        write=write_cosmos,
        plain_loop=cosmos_loop,
        batch=partial(with_texts, lambda run: run.config.version.transformer["text_embed_dim"]),
        caches_texts=True,
    ),
    "dit": Family(
        dit_use_case,
        on_gpu=(Case("DiT-XL/2", "XL/2", 256, 32), Case("DiT-XL/2 512", "XL/2", 512, 8)),
        on_cpu=(Case("DiT tiny", "mini", 128, 16), Case("DiT small", "S/2", 256, 2)),
        write=write_autoencoder,
        plain_loop=dit_loop,
        undropped={"class_dropout": 0.0},
    ),
    "latte": Family(
        latte_use_case,
        on_gpu=(Case("Latte-XL/2", "XL/2", 256, 5, num_frames=16),),
        on_cpu=(Case("Latte tiny", "mini", 96, 8, num_frames=6), Case("Latte small", "S/2", 64, 2, num_frames=8)),
        write=write_autoencoder,
        plain_loop=dit_loop,
        undropped={"class_dropout": 0.0},
    ),
    "nova": Family(
        nova_use_case,
        on_gpu=(
            Case("NOVA 0.6B", "d48w1024-sdxl1024", 1024, 8, num_frames=1),
            Case("NOVA 0.6B clips", "d48w1024-osp480", 480, 1, num_frames=33),
        ),
        on_cpu=(
            Case("NOVA tiny", "mini", 128, 16, num_frames=1), Case("NOVA clips", "mini-video", 64, 4, num_frames=17),
        ),
        write=lambda case, folder, device: write_nova(case.version, folder),
        plain_loop=nova_loop,
        batch=partial(with_texts, lambda run: run.config.version.text_width),
        caches_texts=True,
    ),
    "open_sora": _stdit(
        on_gpu=(Case("STDiT3-XL/2", "XL/2", 240, 2, num_frames=51),),
        on_cpu=(
            Case("STDiT3 tiny", "mini", 64, 16, num_frames=17), Case("STDiT3 small", "mini", 256, 1, num_frames=33),
        ),
        write=write_clip_autoencoder,
        plain_loop=stdit_loop,
    ),
    "open_sora_1.1": _stdit(
        on_gpu=(Case("STDiT2-XL/2", "STDiT2-XL/2", 240, 2, num_frames=16),),
        on_cpu=(Case("STDiT2 tiny", "mini-1.1", 64, 16, num_frames=6),),
        write=write_autoencoder,
        plain_loop=older_stdit_loop,
    ),
    "open_sora_1.0": _stdit(
        on_gpu=(Case("STDiT-XL/2", "STDiT-XL/2", 256, 2, num_frames=16),),
        on_cpu=(Case("STDiT tiny", "mini-1.0", 64, 16, num_frames=6),),
        write=write_autoencoder,
        plain_loop=older_stdit_loop,
    ),
    "pixart": _captioned(
        pixart_use_case,
        on_gpu=(Case("PixArt 512", "XL/2-512", 512, 16), Case("PixArt 1024-MS", "XL/2-1024-MS", 1024, 4)),
        on_cpu=(Case("PixArt tiny", "mini", 128, 16), Case("PixArt small", "mini", 512, 2)),
        write=write_autoencoder,
        plain_loop=pixart_loop,
    ),
}  # fmt: skip
"""By the name that `--families` takes."""
