"""Pictures for prompts, in two halves: what Stage C draws, and what the rest of the cascade makes of it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from families.cascade.sampling import Cascade
from families.common.pipeline import Size
from families.common.sampling import latent_size


class Sketch(NamedTuple):
    """What Stage C drew for N prompts, and what Stage B has to know to finish it.

    latents: (C, h, w) each. pooled: (N, 1, P). unconditional_pooled: (1, 1, P).
    """

    latents: list[Tensor]
    pooled: Tensor
    unconditional_pooled: Tensor
    size: Size
    seeds: Sequence[int]


def sketch(
    cascade: Cascade,
    prompts: Sequence[str],
    seeds: Sequence[int],
    size: Size,
    *,
    negative_prompt: str = "",
    image: Tensor | None = None,
    noise_level: float | None = None,
    **sampling,
) -> Sketch:
    """Draw Stage C's latents for prompts, each with its seed, for pictures of `size` (H, W).

    Args:
        image: a picture (3, H, W) in [0, 1] that Stage C sees; with `noise_level`, one to start from instead.
        **sampling: see `Cascade.draw_c` and `draw_latents`.
    """
    texts = list(dict.fromkeys([*prompts, negative_prompt]))
    read = cascade.read(texts)
    conditions = {name: values[[texts.index(prompt) for prompt in prompts]] for name, values in read.items()}
    unconditional = {name: values[[texts.index(negative_prompt)]] for name, values in read.items()}
    if noise_level is not None:
        version = cascade.settings.version
        latents_size = latent_size(*size, version.compression, version.patch_size)
        sampling |= {"start": cascade.encode([image], [latents_size])[0], "noise_level": noise_level}
    elif image is not None:
        conditions["clip_img"] = cascade.look(image)
    latents = cascade.draw_c(conditions, unconditional, size, seeds, **sampling)
    return Sketch(latents, conditions["clip_text_pooled"], unconditional["clip_text_pooled"], size, seeds)


def finish(cascade: Cascade, drawn: Sketch) -> list[Tensor]:
    """The pictures (3, H, W) in [0, 1] that Stage B and Stage A make of what Stage C drew."""
    sizes = [drawn.size] * len(drawn.latents)
    latents = cascade.draw_b(drawn.latents, drawn.pooled, drawn.unconditional_pooled, sizes, drawn.seeds)
    return cascade.decode(latents, sizes)
