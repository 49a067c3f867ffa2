"""Configuration keys that the scripts of Stable Diffusion share."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from families.common.autoencoders import Latent
from families.common.config import DiffusionConfig, VersionSettings
from families.common.precision import Precision
from families.common.prompt_flags import Prompt
from families.stable_diffusion.t5_layers import MAX_TOKENS
from families.stable_diffusion.versions import VERSIONS, Version
from warpcore.config import Share
from warpcore.diffusion.loss_weights import LOSS_WEIGHTS
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.idle_keys import Need
from warpcore.keys import Weights


class SdSettings(VersionSettings):
    """Which Stable Diffusion, and where its networks are.

    Each key for weights takes a pipeline of diffusers (a folder), the folder of that network alone, a checkpoint in
    one file as A1111 and ComfyUI have it, a file that a run exported, or a name of the Hugging Face hub.
    """

    model_version: Literal["sd15", "sdxl", "mini"] = "sd15"
    """Sizes of the networks where their files don't say them; `mini` is a toy for 128 px pictures."""
    autoencoder_checkpoint_path: Weights | None = None
    """The autoencoder; by default that of the pipeline or checkpoint in `generator_checkpoint_path`."""
    text_encoder_checkpoint_path: Weights | None = None
    """The text encoders (CLIP; SDXL has two); by default those of `generator_checkpoint_path`. With `text_model: t5`,
    T5 as a folder of transformers, by default that of the pipeline, or DeepFloyd/t5-v1_1-xxl."""
    text_model: Literal["clip", "t5"] = "clip"
    """What reads texts: CLIP as published, or T5, whose states a linear layer brings to the width that the U-Net
    reads. The U-Net is told no mask."""
    text_tokens: Annotated[int, Field(gt=0, le=MAX_TOKENS)] = 256
    """With `text_model: t5`, how many tokens of a text the U-Net sees: 1.5 gets rows of zeros after shorter texts,
    SDXL the states of the padding. Caches of texts are made for one value."""
    text_projection_checkpoint_path: Weights | None = None
    """With `text_model: t5`, the folder of a pipeline with `t5_projection` (and SDXL's `t5_pooled_projection`), or for
    1.5 of that layer alone; by default that of the pipeline in `generator_checkpoint_path`, else fixed random numbers,
    the same in every run. It is not trained."""
    autoencoder_version: Literal["sd15", "sdxl"] | None = None
    """Which autoencoder a file is that does not say it: those of 1.5 and of SDXL are alike but for the scale of their
    latents. By default that of `model_version`."""
    autoencoder_precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """What the autoencoder computes in, whatever `dtype` says. SDXL's overflows in float16, which is refused."""
    text_encoder_precision: Precision = "float32"
    """What frozen text encoders are kept and computed in; `nf4` in four bits (needs torchao)."""
    text_chunks: Annotated[int, Field(gt=0, le=100)] = 1
    """How many times 75 tokens of a text are read, each 75 by themselves: 2 and 3 are the lengths 150 and 225 of
    kohya's sd-scripts. The rest of longer texts is cut off. Caches of texts are made for one value."""
    clip_skip: PositiveInt | None = None
    """Which hidden state of the text encoders from the end the U-Net reads: 1 the last, as 1.5 was trained; 2 the one
    before, as SDXL and many finetunes of 1.5 were. By default what the files say, or as published. Caches of texts are
    made for one value."""
    zero_terminal_snr: bool | None = None
    """The last timestep is nothing but noise (arXiv:2305.08891), which wants `diffusion_target: v`. By default what
    the files say, or false."""

    @property
    def version(self) -> Version:
        return VERSIONS[self.model_version]

    @model_validator(mode="after")
    def _texts_of_t5(self) -> Self:
        of_t5, of_clip = {"text_tokens", "text_projection_checkpoint_path"}, {"text_chunks", "clip_skip"}
        given = (of_t5 if self.text_model == "clip" else of_clip) & self.model_fields_set
        wrong = sorted(key for key in given if getattr(self, key) != type(self).model_fields[key].default)
        if wrong:
            raise ValueError(f"{wrong[0]} is not for text_model: {self.text_model}; remove it")
        return self


class SdConfig(SdSettings, DiffusionConfig):
    """Keys of the scripts that train."""

    needs = {
        "min_sigma": Need(  # without a target, a file says it
            "diffusion_target: rectified_flows",
            lambda config: config.diffusion_target in (None, "rectified_flows"),
        ),
        "zero_terminal_snr": Need(
            "timesteps, which diffusion_target: rectified_flows does not have",
            lambda config: not (config.zero_terminal_snr and config.diffusion_target == "rectified_flows"),
        ),
    }

    latent: Latent = "sample"
    """What of the autoencoder's moments is learned: a draw for each sample and epoch, or the `mean`."""
    caption_dropout: Share = 0.1
    """Share of the captions replaced by an empty one, so that guidance has something to compare with."""
    min_sigma: Annotated[float, Field(ge=0, lt=0.5)] = 1e-5
    """With `diffusion_target: rectified_flows`, the share of noise is drawn between this and 1 minus this."""
    loss_weight: Literal[tuple(LOSS_WEIGHTS)] = "constant"
    """How much the loss of each noise level counts. A formula published for the error of another prediction than
    `diffusion_target` is converted."""
    sample_prompts: list[Prompt] = []
    """Captions to draw at every save; without them those of held-out samples, or else of a few training samples, are
    taken."""
    sample_guidance: float = 7.5
    """Classifier-free guidance of those pictures."""
    sample_sampler: Literal[tuple(SAMPLERS)] = "ddim"
    """Sampler of those pictures."""

    @property
    def trains_text_encoders(self) -> bool:
        """Whether all of the text encoders' weights are trained."""
        return False


class SdFinetuneConfig(SdConfig):
    """Keys of `train/train_sd.py`."""

    train_text_encoder: bool = False
    """Train the text encoders along with the U-Net, in float32; caches then hold no texts. The run's folder gets
    `text_encoder.safetensors`, and for SDXL `text_encoder_2.safetensors`."""
    text_encoder_lr: PositiveFloat | list[PositiveFloat] | None = None
    """Their learning rate, or one each, as `[5e-6, 1e-6]`; by default `lr`."""

    @model_validator(mode="after")
    def _text_encoders(self) -> Self:
        if not self.train_text_encoder:
            if self.text_encoder_lr is not None:
                raise ValueError("text_encoder_lr: no text encoder is trained; write train_text_encoder: true")
            return self
        if self.text_model == "t5":
            raise ValueError("train_text_encoder: T5 is not trained; remove it, or write text_model: clip")
        if self.text_encoder_precision != "float32":
            raise ValueError("text_encoder_precision: text encoders that are trained are kept in float32")
        if self.cache_text:
            raise ValueError("cache_text: what captions mean changes with train_text_encoder; remove one of the two")
        count = max(len(self.version.text), 1)
        if isinstance(self.text_encoder_lr, list) and len(self.text_encoder_lr) != count:
            raise ValueError(f"text_encoder_lr: {self.model_version} has {count} text encoders; write {count} numbers")
        return self

    @property
    def trains_text_encoders(self) -> bool:
        return self.train_text_encoder

    @property
    def text_encoder_rates(self) -> list[float]:
        """The learning rate of each text encoder."""
        given, count = self.text_encoder_lr or self.lr, max(len(self.version.text), 1)
        return given if isinstance(given, list) else [given] * count
