"""The codebook of Stage A, learnt as moving averages of the latents that choose each code (arXiv:1711.00937, A.1)."""

import torch
from torch import Tensor, nn

from warpcore.random import SampleRandom, stable_hash
from warpcore.transfer import to_device

CANDIDATES = 32
"""So many latents of each micro-batch may become codes."""


def codebook_statistics(latents: Tensor, indices: Tensor, num_codes: int, random: SampleRandom) -> dict[str, Tensor]:
    """What `CodebookAverages.step` wants to know of a micro-batch, the same shapes whatever its size.

    Args:
        latents: (B, C, H, W), scaled like the codes. indices: (B, H, W), the codes they chose.

    Returns `counts` (1, N), `sums` (1, N, C), and some of the latents, `candidates` (1, CANDIDATES, C).
    """
    flat, chosen = latents.detach().float().permute(0, 2, 3, 1).flatten(0, 2), indices.flatten()
    # As `bincount`, for which Python would wait for a GPU.
    counts = torch.zeros(num_codes, dtype=torch.int64, device=chosen.device).scatter_add_(
        0, chosen, torch.ones_like(chosen)
    )
    # Sorted, the latents of a code are added in one order on every device.
    sums = torch.segment_reduce(flat[chosen.argsort(stable=True)], "sum", lengths=counts, unsafe=True)
    places = random.uniform("candidates")[torch.arange(CANDIDATES, device=flat.device) % len(latents)]
    steps = torch.arange(CANDIDATES, device=flat.device) * 0.618  # spreads those of one sample over its latents
    rows = ((places + steps) % 1 * len(flat)).long().clamp(max=len(flat) - 1)
    return {"counts": counts[None].float(), "sums": sums[None], "candidates": flat[rows][None]}


class CodebookAverages(nn.Module):
    """Moves the codes once per update, and revives those that hardly any latent has chosen for long.

    Args:
        codes: (N, C), changed in place.
        decay: of the averages, per update.
        least_use: a code that is used less than this becomes a latent of the update; 0 revives none.

    Attributes: `use` (N,), how often each code was chosen, averaged; 1 is its fair share, at which a code starts.
    """

    use: Tensor

    def __init__(self, codes: Tensor, decay: float, least_use: float):
        super().__init__()
        self.codes = [codes]  # in a list: it is part of Stage A's state, not of this one's
        self.decay, self.least_use = decay, least_use
        self.register_buffer("use", torch.ones(len(codes), device=codes.device))

    @torch.no_grad()
    def step(self, counts: Tensor, sums: Tensor, candidates: Tensor, seed: int) -> None:
        """Take in the statistics of an update's micro-batches, M instead of 1 in their shapes.

        `seed` decides which candidates become codes.
        """
        codes, candidates = self.codes[0], candidates.flatten(0, 1)
        counts, sums = counts.sum(0), sums.sum(0)
        share = counts / counts.sum().clamp(min=1) * len(codes)
        use = self.decay * self.use + (1 - self.decay) * share
        taken = ((1 - self.decay) * share / use.clamp(min=1e-12))[:, None]
        means = sums / counts[:, None].clamp(min=1)
        codes.copy_(torch.where(counts[:, None] > 0, codes.lerp(means, taken), codes))
        if len(candidates) == 0:
            return
        random = torch.Generator().manual_seed(stable_hash(seed, "revived codes"))
        rows = to_device(torch.randint(len(candidates), (len(codes),), generator=random), codes.device)
        dead = use < self.least_use
        codes.copy_(torch.where(dead[:, None], candidates[rows].to(codes), codes))
        self.use.copy_(torch.where(dead, 1.0, use))
