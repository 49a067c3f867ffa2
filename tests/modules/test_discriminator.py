"""The discriminator that judges reconstructions."""

import pytest
import torch

from modules.discriminator import PatchDiscriminator


@pytest.mark.bits
def test_layers_that_are_computed_again_have_the_same_scores_and_gradients():
    """Also where gradients are asked for twice, first of the pictures and then of the weights, as training does."""
    torch.manual_seed(0)
    pictures, found = torch.rand(2, 3, 32, 32), []
    discriminator = PatchDiscriminator(8)
    for level in (0, 3):
        discriminator.set_activation_checkpointing(level)
        given = pictures.clone().requires_grad_()
        scores = discriminator(given)
        (of_pictures,) = torch.autograd.grad(-scores.sum(), given, retain_graph=True)
        scores.square().mean().backward()
        found.append([scores, of_pictures, given.grad, *(parameter.grad for parameter in discriminator.parameters())])
        discriminator.zero_grad()
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))
