"""Pictures for prompts by NOVA: out of a run, or a published folder."""

from collections.abc import Sequence

from torch import Tensor

from families.common.text_to_image import Drawn, TextToImageConfig
from families.nova.drawing import NovaNetworks, Plan
from families.nova.inference import NovaPictureConfig


class NovaTextToImageConfig(NovaPictureConfig, TextToImageConfig):
    """Keys of `inference/text_to_image.py` for NOVA."""


class NovaTextToImage:
    """Draws pictures with NOVA; see `families.common.text_to_image.TextToImage`."""

    Config = NovaTextToImageConfig
    num_conditions = 0

    def __init__(self, config: NovaTextToImageConfig):
        self.config, self.networks = config, NovaNetworks(config)
        config.check_size(config.size_px)
        self.plan = Plan((1, *config.size_px), config.drawing, config.negative_prompt, config.told_motion)

    def draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Drawn:
        """A picture for each prompt and its seed."""
        pictures: dict[int, Tensor] = {}
        self.networks.draw(prompts, seeds, self.plan, lambda number, clip: pictures.update({number: clip[0]}))
        return Drawn([pictures[number] for number in range(len(prompts))])

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
