"""Bad input: the type of the exception, and a message that names the argument, the value given and those wanted."""

import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from support.oracle import two
from support.refusals import D, M, N, arguments, refuse
from torch import Tensor

from tcm_fused import TCMLoss, tcm_loss
from tcm_fused.backends import choice
from tcm_fused.backends.numerics import as_precise_as_asked


def test_a_good_call_is_good(backend: str) -> None:
    assert tcm_loss(**arguments(), backend=backend).item() == pytest.approx(0.5)


# Shapes.


@pytest.mark.parametrize("shape", [(), (N,), (N, D, 1), (N, 0), (0,)])
@pytest.mark.parametrize("name", ["embeddings", "ref_emb"])
def test_rank_of_embeddings(name: str, shape: tuple[int, ...]) -> None:
    refuse(ValueError, f"{name} must have shape [", ", D]", f"got {list(shape)}", **{name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(), (N, 1), (1, N), (N - 1,), (N + 1,), (0,)])
def test_shape_of_labels(shape: tuple[int, ...]) -> None:
    labels = torch.zeros(shape, dtype=torch.int64)
    refuse(ValueError, f"labels must have shape [{N}]", "embeddings", f"got {list(shape)}", labels=labels)


@pytest.mark.parametrize("shape", [(), (M, 1), (M - 1,), (M + 1,), (0,)])
def test_shape_of_ref_labels(shape: tuple[int, ...]) -> None:
    labels = torch.zeros(shape, dtype=torch.int64)
    refuse(ValueError, f"ref_labels must have shape [{M}]", "ref_emb", f"got {list(shape)}", ref_labels=labels)


def test_different_d() -> None:
    refuse(ValueError, f"ref_emb has D={D + 1}", f"embeddings have D={D}", ref_emb=torch.ones(M, D + 1))


@pytest.mark.parametrize(("given", "missing"), [("ref_emb", "ref_labels"), ("ref_labels", "ref_emb")])
def test_half_a_reference_set(given: str, missing: str) -> None:
    refuse(ValueError, f"{given} came without {missing}", **{missing: None})


# Types and devices.


@pytest.mark.parametrize("name", ["embeddings", "labels", "ref_emb", "ref_labels"])
@pytest.mark.parametrize("value", [[[1.0]], np.ones((N, D)), 1.5, "text"], ids=["list", "ndarray", "float", "str"])
def test_not_a_tensor(name: str, value: Any) -> None:
    refuse(TypeError, f"{name} must be a torch.Tensor", type(value).__name__, **{name: value})


@pytest.mark.parametrize("name", ["embeddings", "labels"])
def test_none_is_not_a_tensor(name: str) -> None:
    call: dict[str, Any] = {**arguments(), name: None}
    with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got NoneType"):
        tcm_loss(**call)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["embeddings", "ref_emb"])
def test_dtype_of_embeddings(name: str, dtype: torch.dtype) -> None:
    x = torch.ones(N if name == "embeddings" else M, D).to(dtype)
    refuse(TypeError, f"{name} must be float16, bfloat16, float32 or float64", str(dtype), **{name: x})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_floats_of_8_bits(dtype: torch.dtype) -> None:
    x = torch.ones(N, D).to(dtype)
    parts = ("embeddings must be float16, bfloat16, float32 or float64", str(dtype))
    refuse(TypeError, *parts, embeddings=x, ref_emb=None, ref_labels=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", ["labels", "ref_labels"])
def test_dtype_of_labels(name: str, dtype: torch.dtype) -> None:
    labels = torch.ones(N if name == "labels" else M, dtype=dtype)
    refuse(TypeError, f"{name} must have an integer dtype", str(dtype), **{name: labels})


@pytest.mark.parametrize("name", ["labels", "ref_labels"])
def test_labels_beyond_int64(name: str) -> None:
    labels = np.zeros(N if name == "labels" else M, dtype=np.uint64)
    labels[2] = 2**63
    refuse(ValueError, f"{name} must be below 2**63", **{name: torch.from_numpy(labels)})


@pytest.mark.parametrize(("x", "ref_x"), [(torch.float32, torch.float64), (torch.float16, torch.float32)])
def test_different_dtypes(x: torch.dtype, ref_x: torch.dtype) -> None:
    sets = {"embeddings": torch.ones(N, D, dtype=x), "ref_emb": torch.ones(M, D, dtype=ref_x)}
    refuse(TypeError, f"ref_emb is {ref_x}", f"embeddings are {x}", "autocast", **sets)


def test_different_devices() -> None:
    refuse(ValueError, "labels are on meta", "embeddings on cpu", labels=torch.arange(N, device="meta"))
    refuse(ValueError, "ref_labels are on meta", "ref_emb on cpu", ref_labels=torch.arange(M, device="meta"))
    reference = {"ref_emb": torch.ones(M, D, device="meta"), "ref_labels": torch.arange(M, device="meta")}
    refuse(ValueError, "ref_emb is on meta", "embeddings on cpu", **reference)


# Numbers.


@pytest.mark.parametrize("name", ["margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float32("nan")])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    refuse(ValueError, f"{name} must be finite", f"got {value}", **{name: value})


@pytest.mark.parametrize("name", ["margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
def test_integers_beyond_a_float(name: str) -> None:
    refuse(ValueError, name, **{name: 10**400})


@pytest.mark.parametrize("name", ["margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
@pytest.mark.parametrize("value", ["0.5", [0.5], 0.5j, np.array(0.5)], ids=["str", "list", "complex", "array"])
def test_not_a_number(name: str, value: Any) -> None:
    refuse(TypeError, f"{name} must be a number", type(value).__name__, **{name: value})


@pytest.mark.parametrize("name", ["margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
def test_none_is_not_a_number(name: str) -> None:
    call: dict[str, Any] = {**arguments(), name: None}
    with pytest.raises(TypeError, match=f"{name} must be a number, got NoneType"):
        tcm_loss(**call)


@pytest.mark.parametrize("name", ["margin_plus", "margin_minus", "lambda_plus", "lambda_minus"])
@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (torch.ones(1), ValueError, ["0-d tensor", "shape [1]"]),
        (torch.ones(2, 3), ValueError, ["0-d tensor", "shape [2, 3]"]),
        (torch.ones(1).to_sparse(), ValueError, ["0-d tensor", "sparse"]),
        (torch.tensor(1j), TypeError, ["must be real", "complex64"]),
        (torch.tensor(True), TypeError, ["must be real", "bool"]),
        (torch.tensor(torch.nan), ValueError, ["must be finite", "got nan"]),
        (torch.tensor(-torch.inf), ValueError, ["must be finite", "got -inf"]),
        (torch.tensor(1.0, requires_grad=True), ValueError, ["requires a gradient", ".detach()", "suggest_margins"]),
        (torch.nn.Parameter(torch.tensor(1.0)), ValueError, ["requires a gradient", ".detach()"]),
        (torch.tensor(1.0, device="meta"), ValueError, ["is on meta", "embeddings on cpu"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value).replace("\n", "")[:30],
)
def test_tensors_that_are_no_margins(name: str, value: Any, kind: type[Exception], words: list[str]) -> None:
    refuse(kind, name, *words, **{name: value})
    refuse(kind, name, *words, **{name: value}, reduction="all")
    if value.device.type == "cpu":
        with pytest.raises(kind, match=name):
            TCMLoss(**{name: value})
        criterion = TCMLoss()
        setattr(criterion, name, value)
        with pytest.raises(kind, match=name):
            criterion(torch.ones(N, D), torch.arange(N))


def test_negative_weight_in_a_tensor() -> None:
    refuse(ValueError, "lambda_plus must be finite and at least 0", "got -1", lambda_plus=torch.tensor(-1.0))


def test_margins_have_no_forward_derivative() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.tensor(0.9), torch.tensor(1.0))
        refuse(ValueError, "margin_plus requires a gradient", margin_plus=dual)
    with pytest.raises(ValueError, match="margin_plus requires a gradient"):
        torch.func.grad(lambda m: tcm_loss(torch.ones(N, D), torch.arange(N), margin_plus=m))(torch.tensor(0.9))


@pytest.mark.parametrize("name", ["lambda_plus", "lambda_minus"])
@pytest.mark.parametrize("value", [-1, -1e-30])
def test_negative_lambda(name: str, value: float) -> None:
    refuse(ValueError, f"{name} must be finite and at least 0", f"got {value}", **{name: value})


@pytest.mark.parametrize("offset", [-1, M - N + 1, 10**12, -(2**63), 2**64])
def test_row_offset_outside_the_columns(offset: int) -> None:
    refuse(ValueError, f"row_offset={offset}", f"{N} rows", f"{M} columns", f"from 0 to {M - N}", row_offset=offset)


@pytest.mark.parametrize("offset", [0, 1, -3])
def test_row_offset_with_more_rows_than_columns(offset: int) -> None:
    sets = {"ref_emb": torch.ones(N - 1, D), "ref_labels": torch.arange(N - 1)}
    refuse(ValueError, f"row_offset={offset}", f"{N - 1} rows", "row_offset=None", row_offset=offset, **sets)


@pytest.mark.parametrize(
    "offset", [1.0, "1", True, torch.tensor(1), [1]], ids=["float", "str", "bool", "tensor", "list"]
)
def test_row_offset_is_an_int(offset: Any) -> None:
    refuse(TypeError, "row_offset must be an int or None", type(offset).__name__, row_offset=offset)


def test_row_offset_without_a_reference_set() -> None:
    refuse(ValueError, "row_offset=2", "ref_emb", row_offset=2, ref_emb=None, ref_labels=None)


@pytest.mark.parametrize("offset", [0.0, False, "0", torch.tensor(0)], ids=["float", "bool", "str", "tensor"])
def test_row_offset_is_an_int_without_a_reference_set_too(offset: Any) -> None:
    refuse(TypeError, "row_offset must be an int or None", row_offset=offset, ref_emb=None, ref_labels=None)


# Choices.


@pytest.mark.parametrize("value", ["gpu", "CPU", "", "Torch ", 3, ["cpu"]])
def test_unknown_backend(value: Any) -> None:
    refuse(ValueError, f"backend={value!r}", "'auto'", "'cpu'", "'cuda'", "'triton'", "'torch'", backend=value)


@pytest.mark.parametrize("value", ["tf32", "FP16", "", torch.float16, 16])
def test_unknown_precision(value: Any) -> None:
    refuse(ValueError, f"precision={value!r}", "'auto'", "'fp32'", "'fp16'", precision=value)


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("penalty", ("'hinge'", "'squared'")),
        ("reduction", ("'violating'", "'all'")),
        ("group_pairs", ("'within'", "'across'")),
    ],
)
@pytest.mark.parametrize("value", ["Hinge", "mean", "", 2, ["all"]])
def test_unknown_option(name: str, choices: tuple[str, ...], value: Any) -> None:
    refuse(ValueError, f"{name}={value!r} is not known", *choices, **{name: value})


@pytest.mark.parametrize("name", ["backend", "precision", "penalty", "reduction", "group_pairs"])
def test_none_is_not_a_choice(name: str) -> None:
    call: dict[str, Any] = {**arguments(), name: None}
    with pytest.raises(ValueError, match=f"{name}=None is not known"):
        tcm_loss(**call)


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_backend_that_cannot_run_here(name: str) -> None:
    """With the reason that `info` gives and the remedy; one that is available says which device it needs."""
    reason = choice.why_unavailable(name)
    if reason is not None:
        refuse(RuntimeError, f"backend={name!r} is not available", reason, "backend='torch'", backend=name)
        return
    elsewhere = {key: value.to("meta") for key, value in arguments().items()}
    device = "cpu" if name == "triton" else name  # it is in its interpreter
    refuse(RuntimeError, f"backend={name!r} needs tensors on device '{device}'", "'meta'", backend=name, **elsewhere)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_squares_where_there_are_none(name: str) -> None:
    reason = choice.why_unavailable(name)
    parts = ["squared", "backend='torch'", "penalty='hinge'"] if reason is None else [reason]
    refuse(RuntimeError, f"backend={name!r}", *parts, backend=name, penalty="squared")


def test_missing_extension() -> None:
    """Asked for by name: why, and how to build it. "auto": the fallback, with one warning that points at the caller."""
    script = """
import sys, warnings
sys.modules["tcm_fused._C"] = None
import torch
from tcm_fused import tcm_loss
x, y = torch.randn(9, 3), torch.arange(9) % 2
for backend in ("cpu", "cuda"):
    try:
        tcm_loss(x, y, backend=backend)
    except RuntimeError as error:
        assert f"backend={backend!r} is not available" in str(error), error
        assert "tcm_fused._C" in str(error) and "pip install --no-build-isolation" in str(error), error
        assert "backend='torch'" in str(error), error
    else:
        raise AssertionError(backend)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    losses = [tcm_loss(x, y) for _ in range(3)]
assert len(seen) == 1, seen
assert "fallback" in str(seen[0].message) and "tcm_fused._C" in str(seen[0].message), seen[0]
assert seen[0].filename == "<string>", seen[0].filename
assert torch.equal(losses[0], tcm_loss(x, y, backend="torch"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("error")
def test_auto_is_the_kernel_and_does_not_warn() -> None:
    assert choice.choose("auto", "cpu", torch.float32) == choice.choose("cpu", "cpu", torch.float32)
    tcm_loss(**arguments())


# Margins that are crossed.


def test_crossed_margins_warn_once_for_a_place() -> None:
    x, y = torch.ones(N, D), torch.arange(N)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(3):
            tcm_loss(x, y, margin_plus=0.2 + 0.01 * step, margin_minus=0.5)
        assert len(seen) == 1
        tcm_loss(x, y, margin_plus=torch.tensor(0.2), margin_minus=0.5)
        assert len(seen) == 2
        for _ in range(3):
            criterion = TCMLoss(margin_plus=0.2, margin_minus=0.5)
        criterion(x, y)
        criterion(x, y)
        assert len(seen) == 3
        criterion = TCMLoss()
        tcm_loss(x, y, margin_plus=0.5, margin_minus=0.5)
        assert len(seen) == 3
        criterion.margin_plus = 0.4
        for _ in range(3):
            criterion(x, y)
        assert len(seen) == 4
    for warning in seen:
        assert warning.filename == __file__
        for word in ("margin_plus=0.", "is below margin_minus=0.5", "threshold"):
            assert word in str(warning.message)


def test_nothing_is_left_behind(backend: str) -> None:
    """After a refused call the next good one is right."""
    x: Tensor = torch.ones(N, D, requires_grad=True)
    with pytest.raises(ValueError, match="labels"):
        tcm_loss(x, torch.arange(N + 1), backend=backend)
    torch.autograd.backward(tcm_loss(x, torch.arange(N), backend=backend))
    assert x.grad is not None


# Features of PyTorch that this loss lacks.


@pytest.mark.parametrize("layout", ["sparse", "nested"])
def test_embeddings_that_are_not_dense(layout: str) -> None:
    x = torch.ones(N, D)
    other = x.to_sparse() if layout == "sparse" else torch.nested.nested_tensor([x])
    refuse(TypeError, "embeddings must be a dense tensor", layout, "padding", embeddings=other)


def test_sparse_labels() -> None:
    refuse(TypeError, "labels must be a dense tensor", "sparse", labels=torch.arange(N).to_sparse())


@pytest.mark.parametrize("form", ["jvp", "grad", "dual", "jacrev"])
def test_no_forward_mode_and_no_torch_func(backend: str, form: str) -> None:
    """A derivative that is not there is an error, not a zero."""
    x, y = torch.randn(N, D), torch.arange(N) % 2

    def loss(x: Tensor) -> Tensor:
        return tcm_loss(x, y, backend=backend)

    with pytest.raises(RuntimeError, match=r"tcm_loss has neither forward-mode .*tcm_reference"):
        if form == "jvp":
            torch.func.jvp(loss, (x,), (x,))
        elif form == "dual":
            with torch.autograd.forward_ad.dual_level():
                loss(torch.autograd.forward_ad.make_dual(x, x))
        else:
            getattr(torch.func, form)(loss)(x)


@pytest.mark.parametrize(
    "setting", ["cuda.matmul.fp32_precision = 'tf32'", "fp32_precision = 'tf32'", "cuda.matmul.allow_tf32 = True"]
)
def test_any_way_to_allow_tf32(setting: str) -> None:
    """PyTorch's newer settings make its older question raise; in a process of its own, since they cannot be undone."""
    script = f"""
import torch
from tcm_fused import arguments, tcm_loss
torch.backends.{setting}
tcm_loss(torch.randn(9, 3), torch.arange(9) % 2)
assert arguments._user_allows_less_than_float32("cuda")
assert not arguments._user_allows_less_than_float32("cpu")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_blocked_form_on_a_gpu_has_no_tf32_unless_asked(allowed: str) -> None:
    """The setting that its products see, and that the user's is back afterwards."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    try:
        products.fp32_precision = allowed
        for fp16, seen in ((False, "ieee"), (True, allowed)):
            with as_precise_as_asked("cuda", fp16):
                assert products.fp32_precision == seen
            assert products.fp32_precision == allowed
    finally:
        products.fp32_precision = before


# The operator itself, which trusts nobody: a wrong argument would be read out of bounds.


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({0: torch.ones(N, D, 1)}, "embeddings must be"),
        ({0: torch.ones(N, D, dtype=torch.int32)}, "embeddings must be"),
        ({1: torch.arange(N - 1)}, "labels"),
        ({1: torch.arange(N, dtype=torch.int32)}, "labels must be int64"),
        ({2: torch.ones(M, D + 1)}, "embeddings must be"),
        ({2: torch.ones(M, D, dtype=torch.float64)}, "of one dtype"),
        ({3: torch.arange(M + 1)}, "labels"),
        ({3: None}, "both ref_x and ref_y"),
        ({4: 10**12}, "row_offset"),
        ({4: -1}, "row_offset"),
        ({5: two(0.9, 0.5).float()}, "margins must be"),
        ({5: torch.ones(3, dtype=torch.float64)}, "margins must be"),
        ({5: torch.ones(4, dtype=torch.float64)[::2]}, "margins must be"),
        ({6: torch.ones((), dtype=torch.float64)}, "weights must be"),
    ],
)
def test_operator_refuses_what_it_cannot_read(changed: dict[int, Any], word: str) -> None:
    call = [torch.ones(N, D), torch.arange(N), torch.ones(M, D), torch.arange(M), 0, two(0.9, 0.5), two(1.0, 1.0)]
    call += [False, False, True, True]
    for index, value in changed.items():
        call[index] = value
    with pytest.raises(RuntimeError, match=word):
        torch.ops.tcm_fused.loss(*call)
    if 6 not in changed:
        with pytest.raises(RuntimeError, match=word):
            torch.ops.tcm_fused.penalties(*call[:6], *call[7:])
