"""The codebook of Stage A, learnt as moving averages of the latents that choose each code (arXiv:1711.00937, A.1)."""

import torch
from torch import Tensor, nn

from warpcore.random import stable_hash


class CodebookAverages(nn.Module):
    """Moves the codes once per update, and revives those that hardly any latent has chosen for long.

    Args:
        codes: (N, C), changed in place.
        decay: of the averages, per update.
        least_use: a code that is used less than this becomes a latent of this update.

    Attributes: `use` (N,), how often each code was chosen, averaged; 1 is its fair share.
    """

    use: Tensor

    def __init__(self, codes: Tensor, decay: float, least_use: float):
        super().__init__()
        self.codes = [codes]  # in a list: it is part of Stage A's state, not of this one's
        self.decay, self.least_use = decay, least_use
        self.fresh_use = 2 * least_use  # leaves a new code log(2) / -log(decay) updates to be chosen
        self.register_buffer("use", torch.full((len(codes),), self.fresh_use, device=codes.device))

    @torch.no_grad()
    def step(self, latents: Tensor, indices: Tensor, seed: int) -> None:
        """Take in the latents (M, C) of an update and the codes (M,) they chose. Latents that are not finite do not
        count; `seed` decides which latents become codes."""
        codes = self.codes[0]
        finite = latents.isfinite().all(dim=1)
        if not finite.any():
            return
        latents, indices = latents[finite].to(codes), indices[finite]
        fair = len(latents) / len(codes)
        kept = self.decay * self.use
        taken = (1 - self.decay) / fair * torch.bincount(indices, minlength=len(codes))
        sums = (1 - self.decay) / fair * torch.zeros_like(codes).index_add_(0, indices, latents)
        use = kept + taken
        codes.copy_((kept[:, None] * codes + sums) / use[:, None].clamp(min=1e-12))
        self.use.copy_(use)
        dead = (use < self.least_use).nonzero().flatten()
        random = torch.Generator().manual_seed(stable_hash(seed, "revived codes"))
        codes[dead] = latents[torch.randint(len(latents), (len(dead),), generator=random).to(latents.device)]
        self.use[dead] = self.fresh_use
