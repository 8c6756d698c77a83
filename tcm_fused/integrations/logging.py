"""The hard pairs of the TCM losses in a model, as callbacks log them: how many, and by how much."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tcm_fused.loss import TCMLoss, TCMStats

KEYS = ("hard_positives", "hard_negatives", "violation_positives", "violation_negatives")  # TCMStats, in its order


def criteria(roots: dict[str, object]) -> dict[str, nn.Module]:
    """All modules within `roots` that keep the stats of their last call, by root and path.

    A root that is no module has none. No two have one name: where a path would be another's, it gets a "_" behind it.
    """
    found: dict[str, nn.Module] = {}
    for root_name, root in roots.items():
        for path, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if _keeps_stats(module) and not any(module is other for other in found.values()):
                name = ".".join(part for part in (root_name, path) if part) or type(module).__name__
                while name in found:
                    name += "_"
                found[name] = module
    return found


def _keeps_stats(module: nn.Module) -> bool:
    return isinstance(module, TCMLoss) or isinstance(vars(module).get("stats", ""), TCMStats | None)


class HardPairs:
    """Collects the stats of the TCM losses within `roots`, batch by batch. Nothing waits for the device.

    Which losses there are is settled here, not by their calls, so that all processes know the same ones. Of a loss
    that is called several times in a batch the last call counts.
    """

    def __init__(self, roots: dict[str, object]) -> None:
        self.losses = criteria(roots)
        self.sums: dict[str, Tensor] = {}  # of each loss that was called [5]: of its stats, and its number of calls
        self._last: list[object] = []
        self.start_batch()

    def warn_if_none(self, advice: str) -> None:
        """Warn, with `advice`, if there is no TCM loss."""
        if not self.losses:
            warnings.warn(f"TCMCallback found no TCM loss, so no hard pairs are logged: {advice}", stacklevel=3)

    def start_batch(self) -> None:
        """Calls until now, as in evaluation, are not of the batch."""
        self._last = [_call(module) for module in self.losses.values()]

    def end_batch(self) -> dict[str, Tensor]:
        """The stats of each loss that the batch called, [4] float32 on its device; they are added to `sums`."""
        called = {}
        for (name, module), last in zip(self.losses.items(), self._last, strict=True):
            if _call(module) is not last:
                stats: Any = module.stats
                called[name] = torch.stack([value.detach().to(torch.float32) for value in stats])
                counted = torch.cat([called[name], called[name].new_ones(1)])
                self.sums[name] = self.sums[name] + counted if name in self.sums else counted
        self.start_batch()
        return called

    def take_sums(self, device: torch.device) -> Tensor:
        """[losses, 5] float32: the sums since the last time, 0 for a loss that was not called."""
        zeros = torch.zeros(5, dtype=torch.float32, device=device)
        taken = [self.sums.get(name, zeros).to(device) for name in self.losses]
        self.sums = {}
        return torch.stack(taken)

    def means(self, sums: Tensor) -> dict[str, float]:
        """By key, of `sums` as taken, or of those of all processes together; without losses that none called."""
        rows = zip(self.losses, sums.tolist(), strict=True)
        return self.by_key({name: [total / calls for total in totals] for name, (*totals, calls) in rows if calls})

    def by_key(self, values: dict[str, Any]) -> dict[str, Any]:
        """Of one loss "tcm/hard_positives" and so on; of several with their names, "tcm/NAME/hard_positives"."""
        return {
            f"tcm/{key}" if len(self.losses) == 1 else f"tcm/{name}/{key}": value
            for name, of_loss in values.items()
            for key, value in zip(KEYS, of_loss, strict=True)
        }


def _call(module: nn.Module) -> object:
    """An object that each call of the loss replaces by another."""
    return module.last_call if isinstance(module, TCMLoss) else module.stats
