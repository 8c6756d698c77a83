"""`tcm_loss` and `TCMLoss`: what users call."""

import math
import numbers
import sys
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tcm_fused import ops

_PRECISIONS = ("auto", "fp32", "fp16")
_AUTOCAST_DEVICES = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "mps", "xpu")))


class TCMStats(NamedTuple):
    """What the loss saw, as 0-d tensors on its device: making them does not wait for the device, reading one does.

    Pairs are ordered: (i, j) and (j, i) count as two.
    """

    count_plus: Tensor  # int64, hard positive pairs n+; of no meaning where an embedding is not finite
    count_minus: Tensor  # int64, hard negative pairs n-; likewise
    violation_plus: Tensor  # mean of m+ - s over them, 0 if there are none, NaN where an embedding is not finite
    violation_minus: Tensor  # mean of s - m- over them; likewise


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = ...,
    margin_minus: float = ...,
    lambda_plus: float = ...,
    lambda_minus: float = ...,
    row_offset: int | None = ...,
    precision: str = ...,
    backend: str = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = ...,
    margin_minus: float = ...,
    lambda_plus: float = ...,
    lambda_minus: float = ...,
    row_offset: int | None = ...,
    precision: str = ...,
    backend: str = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TCMStats]: ...


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    margin_plus: float = 0.9,
    margin_minus: float = 0.5,
    lambda_plus: float = 1.0,
    lambda_minus: float = 1.0,
    row_offset: int | None = None,
    precision: str = "auto",
    backend: str = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TCMStats]:
    r"""Threshold-Consistent Margin loss, fused: one pass over the pairs, O(N D) memory, any batch size.

    With cosine similarity s_ij of rows i and columns j,

        L = lambda+ / n+ * sum_{H+} (m+ - s_ij)  +  lambda- / n- * sum_{H-} (s_ij - m-)

        H+ = {(i, j): same label,       s_ij <= m+},  n+ = |H+|
        H- = {(i, j): different labels, s_ij >= m-},  n- = |H-|

    A side without a hard pair adds 0. Without a reference set the columns are the rows and a row is never
    paired with itself. A row with a negative label takes part in no pair and is not looked at (padding, an
    unfilled memory slot). A zero row has similarity 0 to all and gradient 0. If any other embedding is not
    finite, loss and gradient are NaN.

    Args:
        embeddings: [N, D], float16, bfloat16, float32 or float64, of any scale; N may be 0.
        labels: [N], any integer dtype.
        ref_emb: [M, D], the columns, in the dtype of `embeddings` (under autocast any); it gets its gradient
            if it requires one.
        ref_labels: [M], labels of `ref_emb`.
        margin_plus: m+, positives up to this similarity are hard. Any finite number.
        margin_minus: m-, negatives from this similarity on are hard. Any finite number.
        lambda_plus: weight of the positives' term, at least 0.
        lambda_minus: weight of the negatives' term, at least 0.
        row_offset: the column of `ref_emb` that is row 0 itself: pairs (i, row_offset + i) are left out. None:
            no row is among the columns.
        precision: the least precision of the products: "fp32", "fp16", or "auto": "fp16" for 16-bit input, under
            autocast, and where `torch.set_float32_matmul_precision` allows less than the highest; else "fp32".
            On a CPU and with backend="torch" 16-bit input is always worked in float32, and float64 in float64.
        backend: "auto", "cpu", "cuda", "triton" or "torch". One asked for by name runs or raises.
        return_stats: also return a `TCMStats`.

    Returns:
        The loss, a scalar of float64 for float64 input and float32 otherwise; with `return_stats` the pair
        (loss, stats).

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, devices or values do not fit.
        RuntimeError: the backend asked for is not available; the message says why and what to do.

    Source: Zhang et al., Threshold-Consistent Margin Loss for Open-World Deep Metric Learning, ICLR 2024,
    section 4 (arXiv 2307.04047).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
        >>> loss, stats = tcm_loss(x, torch.tensor([0, 0, 1]), return_stats=True)
        >>> round(loss.item(), 4), stats.count_plus.item(), stats.count_minus.item()
        (0.68, 2, 4)
    """
    _check_choice("precision", precision, _PRECISIONS)
    _check_choice("backend", backend, ("auto", *ops.BACKENDS))
    for name, value in (("margin_plus", margin_plus), ("margin_minus", margin_minus)):
        _check_number(name, value)
    for name, value in (("lambda_plus", lambda_plus), ("lambda_minus", lambda_minus)):
        _check_number(name, value, least=0.0)
    _check_set("embeddings", embeddings, "labels", labels)
    device = embeddings.device
    if row_offset is not None and (not isinstance(row_offset, numbers.Integral) or isinstance(row_offset, bool)):
        raise TypeError(f"row_offset must be an int or None, got {type(row_offset).__name__}")
    if ref_emb is None and ref_labels is None:
        if row_offset not in (None, 0):
            raise ValueError(f"row_offset={row_offset} needs ref_emb; without it the rows are the columns, from 0 on")
    elif ref_emb is None or ref_labels is None:
        given, missing = ("ref_labels", "ref_emb") if ref_emb is None else ("ref_emb", "ref_labels")
        raise ValueError(f"{given} came without {missing}; give both or neither")
    else:
        _check_set("ref_emb", ref_emb, "ref_labels", ref_labels)
        _check_reference(embeddings, ref_emb, row_offset)
        ref_labels = _int64(ref_labels, "ref_labels")

    if not torch.compiler.is_compiling():
        _check_differentiation(embeddings, ref_emb)
    operator = ops.OPERATORS[ops.choose(backend, device.type, embeddings.dtype)]
    if ref_emb is not None and ref_emb.dtype != embeddings.dtype:  # under autocast
        wide = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        embeddings, ref_emb = embeddings.to(wide), ref_emb.to(wide)
    grad = torch.is_grad_enabled()
    loss, _, _, penalty, count = operator(
        embeddings,
        _int64(labels, "labels"),
        ref_emb,
        ref_labels,
        None if row_offset is None else int(row_offset),
        float(margin_plus),
        float(margin_minus),
        float(lambda_plus),
        float(lambda_minus),
        _one_fp16_product(embeddings, precision),
        grad and embeddings.requires_grad,
        grad and ref_emb is not None and ref_emb.requires_grad,
    )
    if not return_stats:
        return loss
    violation = (penalty / count.clamp_min(1)).to(loss.dtype)
    return loss, TCMStats(count[0], count[1], violation[0], violation[1])


class TCMLoss(nn.Module):
    """`tcm_loss` as a module, called like pytorch-metric-learning's `ThresholdConsistentMarginLoss`.

    Arguments: those of `tcm_loss`; they are checked at the first call.

    Example:
        >>> criterion = TCMLoss(margin_plus=0.9, margin_minus=0.5)
        >>> embeddings = torch.randn(8, 4, requires_grad=True)
        >>> criterion(embeddings, torch.arange(8) % 2).backward()
    """

    def __init__(
        self,
        margin_plus: float = 0.9,
        margin_minus: float = 0.5,
        lambda_plus: float = 1.0,
        lambda_minus: float = 1.0,
        precision: str = "auto",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.margin_plus = margin_plus
        self.margin_minus = margin_minus
        self.lambda_plus = lambda_plus
        self.lambda_minus = lambda_minus
        self.precision = precision
        self.backend = backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` [N, D] and `labels` [N], against `ref_emb` [M, D] and `ref_labels` [M] if given.

        `indices_tuple` must be None: the loss finds its hard pairs itself.
        """
        if indices_tuple is not None:
            raise ValueError("indices_tuple must be None: TCM finds its hard pairs itself; leave the miner out")
        return tcm_loss(
            embeddings,
            labels,
            ref_emb,
            ref_labels,
            margin_plus=self.margin_plus,
            margin_minus=self.margin_minus,
            lambda_plus=self.lambda_plus,
            lambda_minus=self.lambda_minus,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"margin_plus={self.margin_plus}, margin_minus={self.margin_minus}, lambda_plus={self.lambda_plus}, "
            f"lambda_minus={self.lambda_minus}, precision={self.precision!r}, backend={self.backend!r}"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(map(repr, choices))}")


def _check_number(name: str, value: Any, least: float = -math.inf) -> None:
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of a float
        number = math.inf
    # Not math.isfinite: torch.compile cannot trace it where the number changes from call to call.
    if not max(least, -sys.float_info.max) <= number <= sys.float_info.max:
        raise ValueError(
            f"{name} must be finite{f' and at least {least:g}' if math.isfinite(least) else ''}, got {value}"
        )


def _one_fp16_product(embeddings: Tensor, precision: str) -> bool:
    """Whether similarities may come from one fp16 product, on kernels that have it."""
    if precision != "auto":
        return precision == "fp16"
    if embeddings.dtype == torch.float32:
        return _in_autocast(embeddings) or _user_allows_less_than_float32(embeddings.device.type)
    return embeddings.dtype != torch.float64


def _in_autocast(x: Tensor) -> bool:
    return x.device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(x.device.type)


@ops.constant_when_compiled  # torch.compile cannot trace it, and compiles again when the setting changes
def _user_allows_less_than_float32(device_type: str) -> bool:
    if device_type == "cpu":  # no kernel there has less
        return False
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the user has set what is newer than that: torch.backends.cuda.matmul.fp32_precision
        return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


def _check_differentiation(*embeddings: Tensor | None) -> None:
    """Only reverse-mode autograd is served; torch's own words, or silence, would not say so for the rest."""
    for x in embeddings:
        if x is None:
            continue
        forward_mode = forward_ad.unpack_dual(x).tangent is not None
        if forward_mode or torch._C._functorch.is_gradtrackingtensor(x):
            raise RuntimeError(
                "tcm_loss has neither forward-mode derivatives nor those of torch.func; use backward(), "
                "torch.autograd.grad, or tcm_fused.reference.tcm_reference, which is plain autograd"
            )


def _check_set(name: str, x: Any, labels_name: str, labels: Any) -> None:
    """x [N, D] floating, labels [N] of integers, on one device."""
    for argument, value in ((name, x), (labels_name, labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{argument} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            layout = "nested" if value.is_nested else value.layout
            raise TypeError(f"{argument} must be a dense tensor, got {layout}; use {argument}.to_dense() or padding")
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


def _check_reference(embeddings: Tensor, ref_emb: Tensor, row_offset: Any) -> None:
    if ref_emb.shape[1] != embeddings.shape[1]:
        raise ValueError(f"ref_emb has D={ref_emb.shape[1]}, embeddings have D={embeddings.shape[1]}; they must agree")
    if ref_emb.device != embeddings.device:
        raise ValueError(f"ref_emb is on {ref_emb.device}, embeddings on {embeddings.device}; move them to one device")
    if ref_emb.dtype != embeddings.dtype and not _in_autocast(embeddings):
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


def _int64(labels: Tensor, name: str) -> Tensor:
    """On a GPU, where looking would wait for the device, and under torch.compile, a label from 2**63 on is negative."""
    looks = labels.dtype == torch.uint64 and labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and bool((labels.view(torch.int64) < 0).any()):
        raise ValueError(f"{name} must be below 2**63")
    return labels.to(torch.int64)
