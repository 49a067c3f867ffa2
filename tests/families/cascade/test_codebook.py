"""Codes are the averages of arXiv:1711.00937 (appendix A.1), and none stays unused for ever."""

import torch

from families.cascade.codebook import CANDIDATES, CodebookAverages, codebook_statistics
from modules.stage_a import nearest
from warpcore.random import SampleRandom


def statistics(latents: torch.Tensor, codes: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    indices = nearest(latents.permute(0, 2, 3, 1), codes)
    random = SampleRandom([seed + i for i in range(len(latents))], torch.device("cpu"))
    return codebook_statistics(latents, indices, len(codes), random)


def test_codes_follow_the_formula_of_the_paper():
    torch.manual_seed(0)
    codes, decay = torch.randn(6, 4), 0.9
    averages = CodebookAverages(codes, decay, least_use=0.0)
    fair = 3 * 4 * 5 / 6
    numbers, sums = torch.full((6,), fair), codes * fair  # N and m, as if each code had been chosen fairly before
    for update in range(4):
        # Two micro-batches of different shapes, as two buckets give.
        parts = [torch.randn(2, 4, 4, 5), torch.randn(1, 4, 2, 10)]
        found = [statistics(part, codes, seed=10 * update) for part in parts]
        flat = torch.cat([part.permute(0, 2, 3, 1).flatten(0, 2) for part in parts])
        chosen = torch.nn.functional.one_hot(nearest(flat, codes), 6).float()
        numbers = decay * numbers + (1 - decay) * chosen.sum(0)
        sums = decay * sums + (1 - decay) * chosen.T @ flat
        averages.step(**{name: torch.cat([one[name] for one in found]) for name in found[0]}, seed=update)
        torch.testing.assert_close(codes, sums / numbers[:, None])
        torch.testing.assert_close(averages.use, numbers / fair)


def test_a_code_that_nothing_chooses_becomes_a_latent_of_the_update():
    torch.manual_seed(1)
    codes = torch.randn(5, 4)
    codes[3] = 1000.0
    averages = CodebookAverages(codes, decay=0.5, least_use=0.3)
    latents = torch.randn(2, 4, 8, 8)
    for update in range(2):  # used 1, 0.5, 0.25 times its fair share
        assert (codes[3] == 1000).all()
        averages.step(**statistics(latents, codes, seed=0), seed=update)
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    assert (flat == codes[3]).all(dim=1).any()
    assert averages.use[3] == 1


def test_without_revival_an_unused_code_stays_where_it_is():
    codes = torch.cat([torch.zeros(1, 4), torch.full((1, 4), 1000.0)])
    averages = CodebookAverages(codes, decay=0.5, least_use=0.0)
    for update in range(200):
        averages.step(**statistics(torch.randn(1, 4, 4, 4), codes, seed=update), seed=update)
    assert (codes[1] == 1000).all()


def test_candidates_are_latents_of_the_micro_batch_and_not_all_the_same():
    latents = torch.randn(3, 4, 8, 8)
    candidates = statistics(latents, torch.randn(5, 4), seed=4)["candidates"][0]
    flat = latents.permute(0, 2, 3, 1).flatten(0, 2)
    assert all((flat == one).all(dim=1).any() for one in candidates)
    assert len(candidates.unique(dim=0)) > CANDIDATES // 2
