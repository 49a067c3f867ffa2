"""Batch norms move once per update, by the statistics of all its micro-batches."""

import torch
from torch import nn

from warpcore.statistics import BatchNormStatistics


def test_an_update_of_unequal_micro_batches_moves_a_batch_norm_like_one_big_batch():
    x = torch.randn(12, 3, 5, 4) * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 1
    ours, reference = nn.BatchNorm2d(3, momentum=0.3), nn.BatchNorm2d(3, momentum=0.3)
    statistics = BatchNormStatistics(ours)
    for update in (x, x.flip(0) * 2):
        parts = []
        for part in update.split([2, 7, 3]):
            before = ours.running_var.clone()
            for piece in part.split([1, len(part) - 1]):  # a network may use a batch norm more than once
                normed = ours(piece)
                torch.testing.assert_close(normed, nn.BatchNorm2d(3)(piece))
                normed.square().sum().backward()
            assert torch.equal(ours.running_var, before)
            parts.append(statistics.take())
        statistics.apply(parts)
        reference(update)
    torch.testing.assert_close(ours.state_dict(), reference.state_dict())


def test_a_forward_pass_that_is_not_finite_leaves_them_alone():
    norm = nn.BatchNorm2d(3)
    statistics = BatchNormStatistics(norm)
    norm(torch.full((2, 3, 2, 2), torch.nan))
    statistics.apply([statistics.take()])
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))


def test_evaluation_uses_the_running_statistics_and_leaves_them_alone():
    norm = nn.BatchNorm2d(3)
    BatchNormStatistics(norm)
    norm.eval()
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(3).eval()(x))


def test_norms_in_evaluation_mode_stay_as_they_are():
    network = nn.Sequential(nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3))
    statistics = BatchNormStatistics(network)
    network(torch.randn(4, 3, 2, 2) + 5)
    statistics.apply([statistics.take()])
    assert torch.equal(network[0].running_mean, torch.zeros(3))
    assert (network[1].running_mean != 0).all()
