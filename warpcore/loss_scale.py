"""`dtype: float16`: a factor on the loss keeps small gradients from vanishing (arXiv:1710.03740, section 3.2).

float16 ends at 65504 and loses what is below 6e-8. Gradients are computed of the loss times a factor, and are divided
by it before they are clipped. The factor is a power of two, so that nothing is rounded. It halves where gradients
overflow, which skips that update, and doubles after GROWTH_UPDATES without.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

START, FLOOR = 2.0**16, 1.0
GROWTH_UPDATES = 2000
"""START and this are those of torch.amp.GradScaler."""


class LossScale:
    """The factor of a run; it is decided on the device, without waiting. Does nothing where not `enabled`."""

    def __init__(self, device: torch.device, enabled: bool):
        self.enabled = enabled
        self._scale = torch.full((), START, device=device)
        self._good_updates = torch.zeros((), device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """A loss (0-d) times the factor."""
        return loss * self._scale if self.enabled else loss

    @torch.no_grad()
    def unscale(self, parameters: Iterable[Tensor], times: Tensor | None = None) -> None:
        """Divide gradients by the factor, and multiply them with `times` (0-d), if it is given."""
        if not self.enabled and times is None:
            return
        inverse = (1 if times is None else times) / (self._scale if self.enabled else 1)
        for parameter in parameters:
            if parameter.grad is not None:
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                grad.mul_(inverse.to(grad.device))

    def metrics(self) -> dict[str, Tensor]:
        """The factor of this update, to report."""
        return {"loss_scale": self._scale.clone()} if self.enabled else {}

    def update(self, norm: Tensor, finite: Tensor) -> None:
        """Choose the factor of the next update.

        Args:
            norm: of all gradients (0-d), the same on every process; infinite or no number where they overflowed.
            finite: whether the update was made. (One may be skipped for other reasons, which change nothing here.)
        """
        if not self.enabled:
            return
        overflowed, good = ~torch.isfinite(norm), self._good_updates + finite
        grows = good >= GROWTH_UPDATES
        scale = torch.where(grows, self._scale * 2, self._scale)
        self._scale = torch.where(overflowed, self._scale / 2, scale).clamp(min=FLOOR)
        self._good_updates = torch.where(overflowed | grows, 0.0, good)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, as JSON; waits for the device."""
        return {"scale": self._scale.item(), "good_updates": self._good_updates.item()} if self.enabled else {}

    def load(self, state: dict[str, float]) -> None:
        """Restore `state()`; that of a run with another dtype is empty, and changes nothing."""
        if self.enabled and state:
            self._scale.fill_(state["scale"])
            self._good_updates.fill_(state["good_updates"])
