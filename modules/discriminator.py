"""A patch discriminator: tells, patch by patch, pictures from reconstructions (arXiv:1611.07004)."""

from torch import Tensor, is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint


class PatchDiscriminator(nn.Module):
    """Pictures (B, 3, H, W) in [0, 1] -> scores (B, 1, h, w), larger where a patch of about 70 px looks real.

    Its norms look at each sample alone, where the paper's look at the batch: the score of a picture does not depend on
    its batch mates, nor training on how a batch is cut into micro-batches.

    Args:
        c_hidden: channels after the first layer; doubled by each of the following `levels`, up to 8 times as many.
        levels: further layers that halve the sides.
    """

    checkpointed = False

    def __init__(self, c_hidden: int = 64, levels: int = 2):
        super().__init__()
        layers = [nn.Conv2d(3, c_hidden, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(levels + 1):
            c_from, c_to = (c_hidden * min(2**i, 8) for i in (level, level + 1))
            stride = 2 if level < levels else 1
            layers += [nn.Conv2d(c_from, c_to, 4, stride, padding=1), nn.GroupNorm(8, c_to), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(c_to, 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def set_activation_checkpointing(self, level: int) -> None:
        """Level 3 computes all layers again in the backward pass."""
        self.checkpointed = level == 3

    def forward(self, pictures: Tensor) -> Tensor:
        if self.checkpointed and is_grad_enabled():
            return checkpoint(self.layers, pictures * 2 - 1, use_reentrant=False)
        return self.layers(pictures * 2 - 1)
