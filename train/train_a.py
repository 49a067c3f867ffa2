"""Train Stage A from scratch: the auto-encoder between pictures and the latents that Stage B draws.

    python3 train/train_a.py configs/training/mini_a.yaml

A VQGAN (arXiv:2012.09841): pixels, a perceptual distance where its weights are given, and from `discriminator_start`
on a patch discriminator say how good a reconstruction is. Codes are averages of the latents that choose them.
"""

import warpcore.openmp

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from families.cascade import build
from families.cascade.codebook import CodebookAverages, codebook_statistics
from families.cascade.config import FamilySettings
from families.cascade.training import CascadeTraining
from families.common.pictures import image_metrics, to_pictures, to_uint8
from families.common.reconstruction_losses import ReconstructionConfig, ReconstructionTraining
from warpcore.config import Share
from warpcore.data.reader import Batch
from warpcore.keys import Weights
from warpcore.random import SampleRandom, stable_hash
from warpcore.results import Losses, Sampled, per_sample


class StageAConfig(FamilySettings, ReconstructionConfig):
    stage_a_checkpoint_path: Weights | None = None
    """Weights to start from; random ones without it."""
    commitment_weight: NonNegativeFloat = 0.25
    """Pulls the encoder towards the codes it chooses."""
    quantised: Share = 0.5
    """Share of the samples rebuilt from codes; the others from plain latents, which is what Stage B makes."""
    codebook_decay: Share = 0.99
    """Decay of the averages that the codes are, per update."""
    dead_code_use: NonNegativeFloat = 0.03
    """A code chosen less often than this becomes a latent of the update; 1 is its fair share, 0 revives none."""


class TrainStageA(CascadeTraining, ReconstructionTraining):
    Config = StageAConfig

    def build(self) -> dict[str, nn.Module]:
        config = self.config
        stage_a = build.stage_a(config, from_scratch=config.stage_a_checkpoint_path is None).to(self.device)
        self.codebook = CodebookAverages(stage_a.codes, config.codebook_decay, config.dead_code_use)
        self.bookkeeping["codebook"] = self.codebook
        networks = {"stage_a": stage_a} | self.judges()
        self.trainable = {name: {} for name in networks if name != "perceptual"}
        return networks

    def loss(self, pictures: Tensor, random: SampleRandom) -> Losses:
        config, stage_a = self.config, self.networks["stage_a"]
        if not torch.is_grad_enabled():
            return self._measure(pictures)
        from_codes = random.uniform("quantised") < config.quantised
        rebuilt, latents, codes = stage_a(pictures, from_codes)
        rebuilt, latents = rebuilt.float(), latents.float()
        loss, squared = self.reconstruction_loss(rebuilt, pictures)
        loss, metrics = self.with_discriminator(loss, rebuilt, pictures)
        loss = loss + config.commitment_weight * codes.commitment
        scaled = latents * stage_a.scale_factor
        statistics = codebook_statistics(scaled, codes.indices, len(stage_a.codes), random)
        metrics["share_of_codes_used"] = (statistics["counts"] > 0).float().mean().expand(len(loss))
        return Losses(loss, squared, statistics, metrics)

    def _measure(self, pictures: Tensor) -> Losses:
        """How well held-out pictures are rebuilt, from plain latents and from codes."""
        metrics = {}
        for suffix, from_codes in {"": False, "_from_codes": True}.items():
            chosen = torch.full((len(pictures),), from_codes, device=self.device)
            rebuilt, _, codes = self.networks["stage_a"](pictures, chosen)
            metrics |= {name + suffix: value for name, value in image_metrics(rebuilt, pictures).items()}
            squared = per_sample((rebuilt.float() - pictures).square())
        used = torch.zeros_like(self.codebook.use).index_fill_(0, codes.indices.flatten(), 1.0)
        metrics["share_of_codes_used"] = used.mean().expand(len(pictures))
        return Losses(squared, squared, metrics=metrics)

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        self.codebook.step(**statistics, seed=stable_hash(self.config.seed, self.update))

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {"stage_a": self.networks["stage_a"].state_dict()}

    def sample(self, held_out: Batch) -> list[Sampled]:
        images = held_out.images[: self.config.sample_count].to(self.device)
        columns = {"picture": to_uint8(images)}
        for name, from_codes in {"rebuilt": False, "from codes": True}.items():
            chosen = torch.full((len(images),), from_codes, device=self.device)
            columns[name] = to_pictures(self.networks["stage_a"](images.float() / 255, chosen)[0])
        return Sampled.rows(held_out.captions[: len(images)], columns)


if __name__ == "__main__":
    TrainStageA.main()
