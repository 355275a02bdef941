"""The loss scale of fp16: gradients are computed this much larger, so that small ones do not become zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

#: As torch.amp.GradScaler: start, growth after this many good steps in a row, and the value that is never doubled.
START, GROWTH_STEPS, LARGEST = 2.0**16, 2000, 2.0**24


@dataclass(slots=True)
class LossScale:
    """A power of two: halved by a gradient that is not finite, doubled after many good steps. Off unless
    ``dynamic``."""

    value: float = 1.0
    good: int = 0
    dynamic: bool = False

    def overflowed(self) -> bool:
        """Halve the scale; False where it cannot be the reason, because it is 1 or there is none."""
        if not self.dynamic or self.value <= 1:
            return False
        self.value, self.good = self.value / 2, 0
        return True

    def went_well(self) -> None:
        """Count a good step."""
        self.good += 1
        if self.dynamic and self.good >= GROWTH_STEPS and self.value < LARGEST:
            self.value, self.good = self.value * 2, 0

    def row(self) -> dict[str, Any]:
        return {"loss_scale": self.value} if self.dynamic else {}


def initial(precision: str) -> LossScale:
    """Only fp16 needs one."""
    return LossScale(START, dynamic=True) if precision == "fp16" else LossScale()
