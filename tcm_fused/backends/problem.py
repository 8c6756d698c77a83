"""The contract of the operators of the loss: their arguments and their results. `csrc/problem.h` is that of kernels."""

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """The arguments of the operator `loss`; `penalties` has the same but for the weights."""

    x: Tensor  # [N, D] rows, of a floating dtype
    y: Tensor  # [N] int64
    ref_x: Tensor | None  # [M, D] columns, in the dtype of x; None: the rows are the columns
    ref_y: Tensor | None  # [M] int64
    row_offset: int | None  # column that is row 0 itself
    # m+ and m-, contiguous float64 (float32 for MPS); on the CPU, where they are read at the call, or on the device of
    # x, whose kernels read them.
    margins: Tensor  # [2]
    weights: Tensor | None  # [2] lambda+ and lambda-, likewise
    squared: bool  # penalties are the squares of the violations
    fp16: bool  # similarities may come from one product in fp16; a kernel that has nothing less than fp32 ignores it
    grad_x: bool  # which gradients are wanted
    grad_ref: bool
    hardest: int | None = None  # of each row only so many hard negatives count, the most similar; None: all


class Result(NamedTuple):
    """The results of `loss`; with no weights there is no loss, and `penalties` returns the penalty in its place.

    Loss and gradients are float64 for float64 embeddings and float32 otherwise. A gradient that is not wanted is empty.
    """

    loss: Tensor | None  # []
    grad_x: Tensor  # [N, D], that of the loss; with no weights [2, N, D], those of the two penalties
    grad_ref: Tensor  # [M, D] or [2, M, D], likewise
    penalty: Tensor  # [2], sums over hard positives and over hard negatives, in float64
    hard: Tensor  # [2] int64, how many of each
