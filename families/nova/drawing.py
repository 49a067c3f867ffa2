"""Drawing with NOVA: text encoder, where it is told texts; then transformer and autoencoder, which hand over each
batch as it is drawn."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from families.common.pipeline import LatentPipeline
from families.common.t5 import padded
from families.nova import build
from families.nova.autoencoder import autoencoder
from families.nova.generation import Drawing
from families.nova.sampling import draw_clips
from modules.nova import NOVATransformer
from warpcore.progress_bar import ProgressBar

Told = dict[str, Tensor]
"""Arguments of `NOVATransformer.condition`."""


@dataclass(frozen=True)
class Plan:
    """How pictures or clips are drawn, all alike."""

    size_px: tuple[int, int, int]
    """(T, H, W)."""
    drawing: Drawing
    negative: str = ""
    """What guidance leads away from; the empty text is the network's own."""
    motion: float | None = None
    """The motion score that the network is told; None: it is told nothing of motion."""
    fps: float | None = None
    """The frames per second that it is told; None: 12."""


class NovaNetworks(LatentPipeline):
    """The networks of NOVA, on the device only while they work."""

    build_autoencoder = staticmethod(autoencoder)

    def read(self, texts: Sequence[str]) -> Told:
        """What the network is told of texts, on the CPU; blank ones have no tokens."""
        length = self.settings.version.text_length
        read = self.read_texts(
            build.text_encoder,
            texts,
            lambda hidden, lengths: {"text": padded(hidden.float(), length), "lengths": lengths},
        )
        return read | {"lengths": read["lengths"] * torch.tensor([bool(text.strip()) for text in texts])}

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        plan: Plan,
        finished: Callable[[int, Tensor], None],
        first: Sequence[Tensor] | None = None,
    ) -> None:
        """Draw a clip (T, 3, H, W) in [0, 1] for each prompt and its seed, and hand over its number and it.

        first: of each clip the first frame, uint8 (3, H, W), which then is not drawn.
        """
        texts = list(dict.fromkeys([*prompts, plan.negative]))
        rows = [texts.index(text) for text in prompts]
        self._draw(self.read(texts), rows, texts.index(plan.negative), seeds, plan, finished, first)

    def draw_classes(
        self, labels: Sequence[int], seeds: Sequence[int], plan: Plan, finished: Callable[[int, Tensor], None]
    ) -> None:
        """The same for classes: a clip of one frame for each."""
        empty = self.settings.num_classes
        self._draw({"labels": torch.arange(empty + 1)}, labels, empty, seeds, plan, finished)

    def _draw(
        self,
        known: Told,
        chosen: Sequence[int],
        empty: int,
        seeds: Sequence[int],
        plan: Plan,
        finished: Callable[[int, Tensor], None],
        first: Sequence[Tensor] | None = None,
    ) -> None:
        """Draw what rows of known conditions stand for, guided away from the row `empty`."""
        most = self.settings.batch_size
        batches = [range(start, min(start + most, len(chosen))) for start in range(0, len(chosen), most)]
        size = plan.size_px[1:]
        with (
            self.holding("transformer", partial(build.network, size_px=size, dtype=self.dtype)) as network,
            self.holding("autoencoder", self.build_autoencoder) as decoder,
        ):
            frames = decoder.latent_frames(plan.size_px[0])
            diffusion = build.process(self.settings)
            for rows in ProgressBar(batches, desc="drawing", unit="batch"):
                begin = None
                if first is not None:
                    clips = torch.stack([first[row] for row in rows])[:, None].to(self.device)
                    begin = decoder.scale.latents(decoder.clip_moments(clips), None)[:, :, 0]
                with self._computing():
                    told = (
                        self._condition(network, known, numbers, plan)
                        for numbers in ([chosen[row] for row in rows], [empty] * len(rows))
                    )
                    latents = draw_clips(
                        network, diffusion, plan.drawing, [seeds[row] for row in rows], frames, *told, begin
                    )
                for row, clip in zip(rows, decoder.decoded_clips(latents.float()), strict=True):
                    finished(row, clip.float().cpu())

    def _condition(self, network: NOVATransformer, known: Told, rows: list[int], plan: Plan) -> Tensor:
        told = self.rows(known, rows)
        numbers = {"flow": plan.motion, "fps": plan.fps if plan.motion is not None else None}
        told |= {name: torch.full((len(rows),), float(number), device=self.device)
                 for name, number in numbers.items() if number is not None}  # fmt: skip
        return network.condition(**told)

    def _computing(self):
        """In 16 bits, tokens and times stay in 32, as in training."""
        is_16 = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if is_16 else nullcontext()
