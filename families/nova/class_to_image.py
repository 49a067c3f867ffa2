"""Pictures of classes by NOVA: out of a run, or a published folder."""

from collections.abc import Sequence

from torch import Tensor

from families.common.class_to_image import ClassToImageConfig
from families.common.classes import title_of
from families.common.drawn_pictures import Drawn
from families.nova.drawing import NovaNetworks, Plan
from families.nova.inference import NovaPictureConfig


class NovaClassToImageConfig(NovaPictureConfig, ClassToImageConfig):
    """Keys of `inference/class_to_image.py` for NOVA."""

    unused = NovaPictureConfig.unused | {"text_encoder_checkpoint_path", "text_encoder_precision", "video_mixer_rank"}
    draws_classes = True


class NovaClassToImage:
    """Draws pictures of classes with NOVA; see `families.common.class_to_image.ClassToImage`."""

    Config = NovaClassToImageConfig

    def __init__(self, config: NovaClassToImageConfig):
        self.config, self.networks, self.labels = config, NovaNetworks(config), config.labels
        self.titles = [title_of(label, config.class_names) for label in self.labels]
        config.check_size(config.size_px)
        self.plan = Plan((1, *config.size_px), config.drawing)

    def draw(self, labels: Sequence[int], seeds: Sequence[int]) -> Drawn:
        """A picture for each class and its seed."""
        pictures: dict[int, Tensor] = {}
        self.networks.draw_classes(labels, seeds, self.plan, lambda number, clip: pictures.update({number: clip[0]}))
        return Drawn([pictures[number] for number in range(len(labels))])

    def notes(self) -> list[str]:
        return [self.networks.peak_memory()]
