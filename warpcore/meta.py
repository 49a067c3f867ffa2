"""Running code on shapes alone: PyTorch's meta device, as if it were the CPU or a GPU, with memory counted."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from warpcore.sharded import plain_parts

META = torch.device("meta")
_ONLY_SHAPES = ContextVar("only shapes", default=False)


@contextmanager
def only_shapes() -> Iterator[None]:
    """Inside, networks are built on the meta device, without weights; their files need not be there, except those
    that alone say which size a network has."""
    before = _ONLY_SHAPES.set(True)
    try:
        yield
    finally:
        _ONLY_SHAPES.reset(before)


def are_only_shapes() -> bool:
    """Whether `only_shapes` holds."""
    return _ONLY_SHAPES.get()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that are allocated inside, beyond `there`: those alive, and the most at any moment.

    A kernel's own workspace is not seen; on the meta device nothing is really allocated, and all is counted alike.

    device: count only what is on devices of this type.
    """

    def __init__(self, there: Iterable[Tensor] = (), device: str | None = None):
        super().__init__()
        self.alive, self.peak, self.device = 0, 0, device
        self._seen = {part.untyped_storage()._cdata for tensor in there for part in plain_parts(tensor)}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in (result,) if type(result) is Tensor else tree_leaves(result):
            for part in plain_parts(tensor) if isinstance(tensor, Tensor) else ():
                self._count(part)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen or self.device not in (None, tensor.device.type):
            return
        self._seen.add(storage._cdata)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


class MixMetaWithCPU(TorchDispatchMode):
    """Lets tensors of the CPU take part in computations on the meta device, as if that were the same device.

    What has values keeps them when it is moved to the meta device, so that code can decide by them; what is computed
    from values and shapes together is a shape.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        there = {t.is_meta for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        with_shapes = True in there
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            kwargs["device"] = META if with_shapes else torch.device("cpu")
        if len(there) == 2:
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        return function(*args, **kwargs)


class MetaAsDevice(TorchFunctionMode):
    """Computes with tensors of the meta device as another device would: with its attention kernels and its autocast.

    kind: "cuda" or "cpu". dtype: what autocast computes in; float32 for none.
    """

    LOWERED = {
        F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.bilinear, torch.matmul,
        torch.mm, torch.bmm, torch.addmm, torch.baddbmm, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
    }  # fmt: skip
    RAISED = {F.layer_norm, F.group_norm, F.softmax, F.mse_loss, F.l1_loss, F.cross_entropy, F.normalize}

    def __init__(self, kind: str, dtype: torch.dtype):
        super().__init__()
        self.kind, self.dtype = kind, dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        autocast = self.dtype != torch.float32
        if function is F.scaled_dot_product_attention:
            args, kwargs = self._cast(self.dtype, args, kwargs) if autocast else (args, kwargs)
            return self._attention(*args, **kwargs)
        if autocast and function in self.LOWERED:
            args, kwargs = self._cast(self.dtype, args, kwargs)
        elif autocast and function in self.RAISED:
            args, kwargs = self._cast(torch.float32, args, kwargs)
        return function(*args, **kwargs)

    @staticmethod
    def _cast(dtype: torch.dtype, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (args, kwargs))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others,
    ) -> Tensor:
        """Attention by the fused kernels, which never hold positions x positions numbers."""
        if query.is_meta and not any(others.values()):
            learned = attn_mask is not None and attn_mask.requires_grad  # the CPU's kernel has no gradient of it
            if self.kind == "cuda" and attn_mask is None:
                flash = torch.ops.aten._scaled_dot_product_flash_attention
                return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
            if self.kind != "cuda" and not dropout_p and not learned:
                flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
                return flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others
        )
