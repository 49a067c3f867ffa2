"""What is counted on shapes is what the device would hold."""

import pytest
import torch
import torch.nn.functional as F

from warpcore.meta import META, MetaAsDevice, PeakMemory


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("given", [{}, {"is_causal": False}, {"is_causal": True, "scale": 0.5}, {"dropout_p": 0.0}])
def test_fused_attention_holds_no_matrix_of_positions(kind, given):
    length = 512
    q, k, v = (torch.empty(1, 1, length, 8, device=META, requires_grad=True) for _ in range(3))
    with PeakMemory(device="meta") as memory, MetaAsDevice(kind, torch.float32):
        F.scaled_dot_product_attention(q, k, v, **given)
    assert 0 < memory.peak < length * length


def test_a_mask_of_the_cpu_stays_fused():
    length = 512
    q, k, v = (torch.empty(1, 1, length, 8, device=META) for _ in range(3))
    mask = torch.empty(1, 1, 1, length, device=META)
    with PeakMemory(device="meta") as memory, MetaAsDevice("cpu", torch.float32):
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert 0 < memory.peak < length * length
