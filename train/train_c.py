"""Train or finetune Stage C: from text to the small latents of a picture.

python3 train/train_c.py configs/training/quickstart_c.yaml
torchrun --nproc-per-node 8 train/train_c.py configs/training/finetune_c_3b.yaml
"""

from torch import Tensor, nn

from cascade import build
from cascade.conditions import prompt_conditions, training_conditions
from cascade.config import CascadeConfig
from cascade.diffusion import draw_latents, make_diffusion, stage_c_latent_size
from cascade.pictures import to_pictures, to_uint8
from modules.effnet import normalise_images
from warpcore.core import Losses, Sampled, WarpCore
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom, stable_hash


class TrainStageC(WarpCore):
    Config = CascadeConfig

    @property
    def bucket_factor(self) -> int:
        return self.config.version.bucket_factor

    def build(self) -> dict[str, nn.Module]:
        config = self.config
        loss_weight = "adaptive" if config.adaptive_loss_weight else config.loss_weight
        self.diffusion = make_diffusion(config.diffusion_target, loss_weight, config.offset_noise)
        self.bookkeeping["diffusion"] = self.diffusion
        networks = {
            "generator": build.stage_c(config),
            "encoder": build.encoder(config),
            "previewer": build.previewer(config),
            "text": build.text(config),
        }
        if config.clip_image_dropout < 1:
            networks["image"] = build.image(config)
        self.image_width = networks["generator"].clip_img_mapper.in_features
        return networks

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor]]:
        networks = self.networks
        latents = networks["encoder"](normalise_images(batch.images.float() / 255).to(self.dtype))
        conditions = training_conditions(
            networks["text"], networks.get("image"), self.image_width, batch, random, self.config
        )
        return latents.float(), conditions

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor]], random: SampleRandom) -> Losses:
        latents, conditions = inputs
        offset = random.normal("offset noise", latents.shape[1], 1, 1) if self.config.offset_noise else None
        diffused = self.diffusion.diffuse(
            latents, random.normal("noise", *latents.shape[1:]), random.uniform("timestep"),
            offset=offset, shift=self.config.shift,
        )  # fmt: skip
        predicted = self.networks["generator"](diffused.noised, diffused.noise_cond, **conditions)
        raw = (predicted.float() - diffused.target).square().mean(dim=(1, 2, 3))
        statistics = {"logsnr": diffused.logsnr, "raw": raw} if self.diffusion.state_dict() else {}
        return Losses(raw * diffused.loss_weight, raw, statistics)

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.diffusion.update_buckets(statistics["logsnr"], statistics["raw"])

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config, networks = self.config, self.networks
        prompts = config.sample_prompts or (held_out.captions if held_out else [])
        prompts = prompts[: config.sample_count]
        if not prompts:
            return []
        height, width = (config.image_size,) * 2 if config.sample_prompts else held_out.size
        sizes = height, width, networks["encoder"].compression, config.version.patch_size
        latents = draw_latents(
            self.diffusion,
            networks["generator"],
            prompt_conditions(networks["text"], prompts, self.image_width, self.device),
            prompt_conditions(networks["text"], [""] * len(prompts), self.image_width, self.device),
            (16, *stage_c_latent_size(*sizes)),
            [stable_hash(config.seed, "sample", i) for i in range(len(prompts))],
            steps=config.sample_steps,
            guidance=config.sample_guidance,
            sampler=config.sample_sampler,
        )
        columns = {"sample": to_pictures(networks["previewer"](latents.to(self.dtype)), (height, width))}
        if not config.sample_prompts:
            columns = {"picture": to_uint8(held_out.images[: len(prompts)])} | columns
        return [Sampled(p, {name: pictures[i] for name, pictures in columns.items()}) for i, p in enumerate(prompts)]


if __name__ == "__main__":
    TrainStageC.main()
