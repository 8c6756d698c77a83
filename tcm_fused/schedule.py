"""`TCMSchedule`: margins and weights of a loss that change from step to step."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tcm_fused.arguments import Options, check_whole

NAMES = ("margin_plus", "margin_minus", "lambda_plus", "lambda_minus")


class TCMSchedule:
    """Leads margins and weights of a TCM loss from start values to those that the loss was made with.

    They stay at the start for `delay` steps, move in a straight line for `steps` steps, and stay at the end after that:

        value(t) = start + (end - start) * min(max((t - delay) / steps, 0), 1),     t = 0, 1, 2, ... calls of `step`

    As it stands this is a warm-up: both weights grow from 0, and the margins stay as they are.

    Used as a scheduler of torch.optim: made once, `step()` after each step of the optimizer, `state_dict()` into the
    checkpoint. The loss gets 0-d tensors of the schedule's own, so torch.compile makes one graph for the whole
    schedule, on every backend: on the GPU where the loss had a tensor there (a CUDA graph captured from then on follows
    it), else of float64 on the CPU. A loss that has had a schedule before keeps the ends of that one. Two schedules at
    a time, say of its weights and of a margin, must have different names.

    Args:
        loss: a `TCMLoss` or `DistributedTCMLoss`, or an adapter's loss; of a `CrossBatchMemory` its `loss`. Under
            `DistributedTCMLoss` every rank has a schedule and steps it alike; ranks that differ are an error there.
        steps: of the straight line, at least 1.
        delay: steps before it, at least 0.
        margin_plus, margin_minus: where they start; None: they are left alone.
        lambda_plus, lambda_minus: likewise, at least 0.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> from tcm_fused import TCMLoss
        >>> tcm = TCMLoss(margin_plus=0.9, margin_minus=0.5)
        >>> schedule = TCMSchedule(tcm, steps=4, delay=2)
        >>> for _ in range(5):
        ...     schedule.step()
        >>> schedule.values()
        {'lambda_plus': 0.75, 'lambda_minus': 0.75}
        >>> tcm.lambda_plus
        tensor(0.7500, dtype=torch.float64)
    """

    def __init__(
        self,
        loss: Any,
        *,
        steps: int,
        delay: int = 0,
        margin_plus: float | None = None,
        margin_minus: float | None = None,
        lambda_plus: float | None = 0.0,
        lambda_minus: float | None = 0.0,
    ) -> None:
        missing = [name for name in NAMES if not hasattr(loss, name)]
        if missing:
            inner = [name for name in ("tcm", "loss") if hasattr(getattr(loss, name, None), missing[0])]
            inside = f"; give its .{inner[0]}" if inner else ""
            raise TypeError(f"loss must be a TCM loss, got {type(loss).__name__}, which has no {missing[0]}{inside}")
        self.loss = loss
        self.steps = check_whole("steps", steps, 1)
        self.delay = check_whole("delay", delay, 0)
        given = zip(NAMES, (margin_plus, margin_minus, lambda_plus, lambda_minus), strict=True)
        start: dict[str, Any] = {name: value for name, value in given if value is not None}
        if not start:
            raise ValueError("all four start values are None, so nothing would change; give that of a margin or weight")
        Options.of(loss)._replace(**start).check()
        self.start = {name: float(value) for name, value in start.items()}
        self.end = {name: _end(loss, name) for name in self.start}
        self.tensors = {name: _tensor_like(getattr(loss, name)) for name in self.start}
        ends = {name: (self.tensors[name], end) for name, end in self.end.items()}
        loss.scheduled = getattr(loss, "scheduled", {}) | ends
        self.count = 0  # calls of `step`
        self._set()

    def step(self) -> None:
        """Go on by one step."""
        self.count += 1
        self._set()

    def values(self) -> dict[str, float]:
        """The values that the loss has now, by name."""
        done = min(max((self.count - self.delay) / self.steps, 0.0), 1.0)
        # So that both ends are exact.
        return {name: (1 - done) * start + done * self.end[name] for name, start in self.start.items()}

    def state_dict(self) -> dict[str, int]:
        """The number of steps. Everything else is an argument: make the schedule again, then load."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a saved number of steps; ValueError if it has none."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != {"count"}:
            got = list(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"state_dict must be a dict that holds 'count' alone, got {got}")
        self.count = check_whole("count", state_dict["count"], 0)
        self._set()

    @torch.no_grad()
    def _set(self) -> None:
        for name, value in self.values().items():
            self.tensors[name].fill_(value)
            setattr(self.loss, name, self.tensors[name])

    def __repr__(self) -> str:
        starts = "".join(f", {name}={value!r}" for name, value in self.start.items())
        return f"TCMSchedule(steps={self.steps}, delay={self.delay}{starts}, count={self.count})"


def _end(loss: Any, name: str) -> float:
    """The value that the loss was made with; of a loss that has had a schedule before, that schedule's end."""
    value = getattr(loss, name)
    tensor, end = getattr(loss, "scheduled", {}).get(name, (None, 0.0))
    return end if value is tensor else float(value)


def _tensor_like(value: float | Tensor) -> Tensor:
    """A new tensor, since another loss may have the same; one that can be written to whatever the mode is now."""
    dtype, device = torch.float64, torch.device("cpu")
    if isinstance(value, Tensor):
        dtype, device = value.dtype if value.is_floating_point() else dtype, value.device
    with torch.inference_mode(False):
        return torch.zeros((), dtype=dtype, device=device)
