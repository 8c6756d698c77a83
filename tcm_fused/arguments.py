"""The arguments of a call: options and sets of rows, and every check of them."""

import math
import numbers
import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tcm_fused.backends import choice
from tcm_fused.backends.numerics import wide_dtype
from tcm_fused.tracing import constant_when_compiled
from tcm_fused.warn import warn_once

_LARGEST = sys.float_info.max
PRECISIONS = ("auto", "fp32", "fp16")
_BACKENDS = ("auto", *choice.BACKENDS)
_AUTOCAST_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


class Rows(NamedTuple):
    """One set of embeddings, with labels and groups."""

    x: Tensor  # [N, D]
    y: Tensor  # [N] int64
    groups: Tensor | None  # [N] int64


class Options(NamedTuple):
    """The options of a call. Margins and weights are numbers or 0-d tensors."""

    margin_plus: float | Tensor
    margin_minus: float | Tensor
    lambda_plus: float | Tensor
    lambda_minus: float | Tensor
    penalty: str
    reduction: str
    group_pairs: str
    precision: str
    backend: str
    hardest_negatives: int | None = None

    @classmethod
    def of(cls, loss: Any) -> "Options":
        """The attributes of a module that has them all."""
        sides = (loss.margin_plus, loss.margin_minus, loss.lambda_plus, loss.lambda_minus)
        others = (loss.penalty, loss.reduction, loss.group_pairs, loss.precision, loss.backend)
        return cls(*sides, *others, loss.hardest_negatives)

    def check(self) -> None:
        """Raises TypeError or ValueError."""
        check_choice("penalty", self.penalty, ("hinge", "squared"))
        check_choice("reduction", self.reduction, ("violating", "all"))
        check_choice("group_pairs", self.group_pairs, ("within", "across"))
        check_choice("precision", self.precision, PRECISIONS)
        check_choice("backend", self.backend, _BACKENDS)
        if self.hardest_negatives is not None:
            check_whole("hardest_negatives", self.hardest_negatives, 1, "; None: all hard negatives count")
        _check_value("margin_plus", self.margin_plus)
        _check_value("margin_minus", self.margin_minus)
        _check_value("lambda_plus", self.lambda_plus, least=0.0)
        _check_value("lambda_minus", self.lambda_minus, least=0.0)

    def margins(self, x: Tensor) -> Tensor:
        """[2] m+ and m-, as the operators take them for embeddings `x`; ValueError if they are on another device."""
        return _sides(x, self.margin_plus, self.margin_minus, ("margin_plus", "margin_minus"))

    def weights(self, x: Tensor) -> Tensor:
        """[2] lambda+ and lambda-, likewise."""
        return _sides(x, self.lambda_plus, self.lambda_minus, ("lambda_plus", "lambda_minus"))

    def warn_of_crossed_margins(self) -> bool:
        """`warn_of_crossed_margins` where both margins can be looked at without waiting for a device."""
        if torch.compiler.is_compiling() or not (_is_known(self.margin_plus) and _is_known(self.margin_minus)):
            return False
        return warn_of_crossed_margins(float(self.margin_plus), float(self.margin_minus))


def warn_of_crossed_margins(margin_plus: float, margin_minus: float) -> bool:
    """Whether margin_plus is below margin_minus; if so with a warning, once in a process for a place in user code."""
    if not -1 <= margin_plus < margin_minus <= 1:  # beyond those a side is left out on purpose, or hard throughout
        return False
    warn_once(
        f"margin_plus={margin_plus:.6g} is below margin_minus={margin_minus:.6g}: the loss is satisfied with positives "
        f"at {margin_plus:.6g} and leaves negatives up to {margin_minus:.6g} as they are, so that no threshold need "
        "separate the two; unless that is wanted, choose margin_plus above margin_minus (the defaults are 0.9 and 0.5)",
        per_place=True,
    )
    return True


def _check_value(name: str, value: Any, least: float = -math.inf) -> None:
    """A margin or weight: a number or a 0-d tensor. The value of a tensor is looked at if that waits for no device."""
    if type(value) is float and -_LARGEST <= value <= _LARGEST and least <= value:  # most are: the rest takes its time
        return
    value = _as_traced(value)
    if not isinstance(value, Tensor):
        check_number(name, value, least, besides="; a 0-d tensor of a number will do as well")
        return
    if value.layout != torch.strided or value.is_nested or value.ndim != 0:
        layout = "" if value.layout == torch.strided and not value.is_nested else f" ({value.layout})"
        raise ValueError(f"{name} must be a number or a 0-d tensor, got a tensor of shape {list(value.shape)}{layout}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got a tensor of {value.dtype}")
    if value.requires_grad or (not torch.compiler.is_compiling() and forward_ad.unpack_dual(value).tangent is not None):
        raise ValueError(
            f"{name} requires a gradient, but margins and weights cannot be learned: the loss has no gradient by them, "
            f"and would only drive them to where it is 0. Pass {name}.detach(), and see tcm_fused.suggest_margins"
        )
    if _is_known(value) and not torch.compiler.is_compiling():
        check_number(name, value.item(), least)


def _as_traced(value: Any) -> Any:
    """A NumPy number, such as one of `np.linspace`, as a tensor where torch.compile traces it: as an array, there."""
    return torch.as_tensor(value) if torch.compiler.is_compiling() and isinstance(value, np.ndarray) else value


def _is_known(value: Any) -> bool:
    """Whether the value of a number or tensor is on the host."""
    if type(value) is float or not isinstance(value, Tensor):
        return True
    return value.device.type == "cpu" and type(value) in (Tensor, Parameter)


def _sides(x: Tensor, plus: float | Tensor, minus: float | Tensor, names: tuple[str, str]) -> Tensor:
    """[2] float64 of two values (float32 on MPS, which has no other): on the CPU, or on the device of `x`.

    Known numbers stay on the CPU, where the operators read them at the call. Those that only a device knows are put
    together there, and so is all under torch.compile: nothing waits for a device, and no graph has a part on the CPU.
    """
    dtype = wide_dtype(x.device)
    if not torch.compiler.is_compiling() and _is_known(plus) and _is_known(minus):
        # Under a mode (of fake tensors, say) it is one of the mode's own tensors, which is of no use elsewhere.
        make = _on_cpu.__wrapped__ if torch._C._len_torch_dispatch_stack() else _on_cpu
        return make(float(plus), float(minus), dtype)
    plus, minus = _as_traced(plus), _as_traced(minus)
    for name, value in zip(names, (plus, minus), strict=True):
        if isinstance(value, Tensor) and value.device != x.device and value.device.type != "cpu":
            raise ValueError(
                f"{name} is on {value.device}, embeddings on {x.device}; a tensor must be on the CPU or on their device"
            )
    # By sums, of which torch.compile makes one graph for all values of a Python float. Of torch.full it makes one for
    # each value, and then keeps an older value elsewhere in the user's graph (seen in torch 2.13).
    zero = torch.zeros((), dtype=dtype, device=x.device)
    return torch.stack([zero + (v.to(dtype) if isinstance(v, Tensor) else v) for v in (plus, minus)])


@lru_cache(maxsize=256)  # two tensors made anew would be a tenth of the time of a small batch
@torch.inference_mode(False)  # autograd may save it
def _on_cpu(plus: float, minus: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor([plus, minus], dtype=dtype, device="cpu")


def check_sets(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None,
    ref_labels: Tensor | None,
    row_offset: int | None,
    groups: Tensor | None,
    ref_groups: Tensor | None,
    group_pairs: str,
) -> tuple[Rows, Rows | None]:
    """Rows and columns (None: the rows) as the operators take them; raises TypeError, ValueError or RuntimeError."""
    check_set("embeddings", embeddings, "labels", labels)
    if row_offset is not None and (not isinstance(row_offset, numbers.Integral) or isinstance(row_offset, bool)):
        raise TypeError(f"row_offset must be an int or None, got {type(row_offset).__name__}")
    if (ref_emb is None) != (ref_labels is None):
        given, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
        raise ValueError(f"{given} came without {missing}; give both or neither")
    if ref_emb is not None:
        check_set("ref_emb", ref_emb, "ref_labels", ref_labels)
        _check_reference(embeddings, ref_emb, row_offset)
    elif row_offset not in (None, 0):
        raise ValueError(f"row_offset={row_offset} needs ref_emb; without it the rows are the columns, from 0 on")
    check_groups_given(groups, ref_emb, ref_groups, group_pairs)
    if groups is not None:
        _check_groups(embeddings, ref_emb, row_offset, groups, ref_groups)
        groups, ref_groups = (None if t is None else t.long() for t in (groups, ref_groups))
    check_differentiation(embeddings, ref_emb)
    if ref_emb is None or ref_labels is None:
        return Rows(embeddings, int64_labels(labels, "labels"), groups), None
    if ref_emb.dtype != embeddings.dtype:  # under autocast
        wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        embeddings, ref_emb = embeddings.to(wide), ref_emb.to(wide)
    columns = Rows(ref_emb, int64_labels(ref_labels, "ref_labels"), ref_groups)
    return Rows(embeddings, int64_labels(labels, "labels"), groups), columns


def check_bank(batch: Rows, bank: Rows | None) -> Rows | None:
    """The rows of a memory as columns for `batch`, in its dtype; None if there are none. Raises ValueError."""
    if bank is None:
        return None
    if bank.x.shape[1] != batch.x.shape[1]:
        raise ValueError(f"embeddings have D={batch.x.shape[1]}, the memory holds D={bank.x.shape[1]}; they must agree")
    if bank.x.device != batch.x.device:
        raise ValueError(
            f"embeddings are on {batch.x.device}, the memory on {bank.x.device}; move the memory with "
            f".to({str(batch.x.device)!r})"
        )
    return bank._replace(x=bank.x.to(batch.x.dtype)) if len(bank.y) else None


def joined(first: Rows, second: Rows) -> Rows:
    """One set after the other; both have groups, or neither."""
    x, y = torch.cat([first.x, second.x]), torch.cat([first.y, second.y])
    if first.groups is None or second.groups is None:
        return Rows(x, y, None)
    return Rows(x, y, torch.cat([first.groups, second.groups]))


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """`value` must be one of `choices`; ValueError."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}")


def check_whole(name: str, value: Any, least: int, besides: str = "") -> int:
    """`value` must be an int of at least `least`; TypeError or ValueError, which end in `besides`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}{besides}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}{besides}")
    return int(value)


def check_number(name: str, value: Any, least: float = -math.inf, besides: str = "") -> None:
    """`value` must be a finite number, at least `least`; TypeError, which ends in `besides`, or ValueError."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{besides}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of a float
        number = math.inf
    # Not math.isfinite: torch.compile cannot trace it where the number changes from call to call.
    if not max(least, -_LARGEST) <= number <= _LARGEST:
        raise ValueError(
            f"{name} must be finite{f' and at least {least:g}' if math.isfinite(least) else ''}, got {value}"
        )


def one_fp16_product(device_type: str, dtype: torch.dtype, precision: str) -> bool:
    """Whether similarities of such embeddings may come from one fp16 product, on kernels that have it."""
    if precision != "auto":
        return precision == "fp16"
    if dtype == torch.float32:
        return _in_autocast(device_type) or _user_allows_less_than_float32(device_type)
    return dtype != torch.float64


def _in_autocast(device_type: str) -> bool:
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


@constant_when_compiled  # torch.compile cannot trace it, and compiles again when the setting changes
def _user_allows_less_than_float32(device_type: str) -> bool:
    if device_type == "cpu":  # no kernel there has less
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the user has set the newer option, torch.backends.cuda.matmul.fp32_precision
        return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


def check_differentiation(*embeddings: Tensor | None) -> None:
    """RuntimeError but for reverse-mode autograd: torch itself would be unclear about the others, or silent."""
    if torch.compiler.is_compiling():
        return
    for x in embeddings:
        if x is None:
            continue
        forward_mode = forward_ad.unpack_dual(x).tangent is not None
        if forward_mode or torch._C._functorch.is_gradtrackingtensor(x):
            raise RuntimeError(
                "tcm_loss has neither forward-mode derivatives nor those of torch.func; use backward(), "
                "torch.autograd.grad, or tcm_fused.reference.tcm_reference, which is plain autograd"
            )


def check_set(name: str, x: Any, labels_name: str, labels: Any) -> None:
    """x [N, D] floating, labels [N] of integers, on one device."""
    check_tensor(name, x)
    check_tensor(labels_name, labels)
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{labels_name} must have an integer dtype, got {labels.dtype}; use {labels_name}.long()")
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{name} must have shape [N, D] with D at least 1, got {list(x.shape)}")
    if labels.ndim != 1 or labels.shape[0] != x.shape[0]:
        raise ValueError(
            f"{labels_name} must have shape [{x.shape[0]}], one label for each row of {name}, got {list(labels.shape)}"
        )
    if labels.device != x.device:
        raise ValueError(f"{labels_name} are on {labels.device}, {name} on {x.device}; move them to one device")


def check_tensor(name: str, value: Any) -> None:
    """`value` must be a plain, dense tensor; TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "to_local"):  # a DTensor
        raise TypeError(
            f"{name} must be a plain tensor, got {type(value).__name__}, whose rows may lie on several ranks; pass "
            f"{name}.to_local() to DistributedTCMLoss, or {name}.full_tensor()"
        )
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} must be a dense tensor, got {layout}; use {name}.to_dense() or padding")


def _check_reference(embeddings: Tensor, ref_emb: Tensor, row_offset: Any) -> None:
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(f"ref_emb has D={ref_emb.shape[1]}, embeddings have D={embeddings.shape[1]}; they must agree")
    if ref_emb.device != embeddings.device:
        raise ValueError(f"ref_emb is on {ref_emb.device}, embeddings on {embeddings.device}; move them to one device")
    if ref_emb.dtype != embeddings.dtype and not _in_autocast(embeddings.device.type):
        raise TypeError(f"ref_emb is {ref_emb.dtype}, embeddings are {embeddings.dtype}; cast one, or use autocast")
    if row_offset is None:
        return
    last = ref_emb.shape[0] - embeddings.shape[0]
    if not 0 <= row_offset <= last:
        raise ValueError(
            f"row_offset={row_offset} puts the {embeddings.shape[0]} rows outside the {ref_emb.shape[0]} columns of "
            f"ref_emb; it must be from 0 to {last}"
            if last >= 0
            else f"row_offset={row_offset} needs every row among the columns, but ref_emb has {ref_emb.shape[0]} rows "
            f"and embeddings have {embeddings.shape[0]}; use row_offset=None"
        )


def check_groups_given(groups: Any, ref_emb: Any, ref_groups: Any, group_pairs: str) -> None:
    """Groups come for all rows or none, and with `group_pairs` where it is not the default. Raises ValueError."""
    if groups is None and group_pairs != "within":
        raise ValueError(
            f"group_pairs={group_pairs!r} came without groups; give the group of each row, or leave it out"
        )
    if ref_groups is not None and (groups is None or ref_emb is None):
        raise ValueError("ref_groups came without groups and ref_emb; give all three, or leave it out")
    if groups is not None and ref_emb is not None and ref_groups is None:
        raise ValueError("groups and ref_emb came without ref_groups; give the group of each row of ref_emb as well")


def _check_groups(embeddings: Tensor, ref_emb: Any, row_offset: Any, groups: Any, ref_groups: Any) -> None:
    for name, value, x in (("groups", groups, embeddings), ("ref_groups", ref_groups, ref_emb)):
        if value is None:
            continue
        check_tensor(name, value)
        if value.is_floating_point() or value.is_complex():
            raise TypeError(f"{name} must have an integer dtype, got {value.dtype}; use {name}.long()")
        if value.shape != x.shape[:1]:
            raise ValueError(f"{name} must have shape [{x.shape[0]}], one group for each row, got {list(value.shape)}")
        if value.device != x.device:
            of = "embeddings" if name == "groups" else "ref_emb"
            raise ValueError(f"{name} are on {value.device}, {of} on {x.device}; move them to one device")
    if ref_groups is not None and row_offset is not None:
        own = ref_groups[row_offset : row_offset + len(groups)]
        if not torch.equal(own.long(), groups.long()):
            raise ValueError(
                f"row_offset={row_offset} says which columns are the rows themselves, but their ref_groups differ from "
                "groups; a row and its own column are of one group"
            )


def int64_labels(labels: Tensor, name: str) -> Tensor:
    """Labels as int64; ValueError from 2**63 on.

    On a GPU, where looking would wait for the device, and under torch.compile such a label becomes negative.
    """
    if labels.dtype == torch.int64:
        return labels
    looks = labels.dtype == torch.uint64 and labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and bool((labels.view(torch.int64) < 0).any()):
        raise ValueError(f"{name} must be below 2**63")
    return labels.to(torch.int64)
