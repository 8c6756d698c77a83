"""Settings made before a call: no product is less exact for them, and all are as they were afterwards."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.calls import CALLS, public_calls
from support.oracle import check
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcm_fused.backends import blocked, blocked_counts, numerics
from tcm_fused.backends.numerics import as_precise_as_asked, product

BACKENDS: Any = torch.backends


def everything() -> dict[str, str]:
    """All settings of float32 products."""
    matmul = {"cuda": BACKENDS.cuda.matmul, "cpu": BACKENDS.mkldnn.matmul}
    found = {name: of.fp32_precision for name, of in {**matmul, "all": BACKENDS, "cudnn": BACKENDS.cudnn}.items()}
    for name in ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction"):
        found[name] = str(getattr(BACKENDS.cuda.matmul, name))
    try:
        found["legacy"] = torch.get_float32_matmul_precision()
    except RuntimeError:  # old and new settings disagree
        found["legacy"] = "mixed"
    return found


def everything_new() -> None:
    BACKENDS.fp32_precision = "bf16"


def only_onednn() -> None:
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"


def mixed() -> None:
    torch.set_float32_matmul_precision("medium")
    BACKENDS.cuda.matmul.fp32_precision = "ieee"
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    assert torch.get_float32_matmul_precision() == "medium"
    BACKENDS.cuda.matmul.fp32_precision = "tf32"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.mkldnn.matmul.fp32_precision = "bf16"
    with pytest.raises(RuntimeError, match="mix"):
        torch.get_float32_matmul_precision()


SETTINGS: dict[str, Callable[[], None]] = {
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "backends.fp32_precision": everything_new,
    "mkldnn.matmul": only_onednn,
    "mixed": mixed,
}


@pytest.fixture(autouse=True)
def settings_back() -> Iterator[None]:
    """Nothing set, as in a new process."""
    yield
    torch.set_float32_matmul_precision("highest")
    BACKENDS.fp32_precision = "none"
    for of in (BACKENDS.cuda.matmul, BACKENDS.mkldnn.matmul, BACKENDS.cudnn):
        of.fp32_precision = "none"
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


class Products:
    """All products of torch in Python, with whether they were exact when they were made."""

    NAMES = ("matmul", "mm", "addmm", "bmm", "einsum", "dot", "mv", "inner")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[bool] = []
        for owner, names in ((torch, self.NAMES), (torch.Tensor, (*self.NAMES, "__matmul__", "__rmatmul__"))):
            for name in names:
                if hasattr(owner, name):
                    monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, original: Any) -> Any:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            a = next(value for value in arguments if isinstance(value, Tensor))
            of_onednn = BACKENDS.mkldnn.matmul.fp32_precision
            exact = a.dtype == torch.float64 or (
                of_onednn in ("none", "ieee") and not torch.is_autocast_enabled("cpu") and a.dtype == torch.float32
            )
            self.seen.append(exact)
            return original(*arguments, **keywords)

        return watched


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("setting", [*SETTINGS, "autocast"])
def test_every_product_is_exact(setting: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the time of each the setting is exact, or the operands are float64, which none reaches."""
    SETTINGS.get(setting, lambda: None)()
    before = everything()
    products = Products(monkeypatch)
    with torch.autocast("cpu", enabled=setting == "autocast"):
        public_calls("torch")[call]()
    assert all(products.seen)
    assert bool(products.seen) == (call != "pairs")  # which are worked one by one
    assert everything() == before


def test_the_watch_sees_what_is_not_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products(monkeypatch)
    a = torch.ones(2, 2)
    torch.mm(a, a)
    assert products.seen[-1]
    with torch.autocast("cpu"):
        torch.mm(a, a)
    assert not products.seen[-1]
    only_onednn()
    assert not (product(a, a) - 2).any()  # in float64
    assert products.seen[-1]
    a @ a
    assert not products.seen[-1]


def test_what_onednn_was_given() -> None:
    """By its own log: no product that it may round, of either backend; of a product of PyTorch's there is one."""
    script = """
import sys, torch
from support.calls import public_calls
torch.set_float32_matmul_precision("medium")
a = torch.randn(64, 64)
a @ a
print("calls", flush=True)
for backend in ("torch", "cpu"):
    for name, call in public_calls(backend).items():
        call()
"""
    environment = {"ONEDNN_VERBOSE": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    control, of_calls = done.stdout.split("calls\n")
    if "attr-fpmath" not in control:
        pytest.skip("PyTorch gives oneDNN no float32 product to round on this processor")
    assert not [line for line in of_calls.splitlines() if "attr-fpmath" in line]


@pytest.mark.parametrize("setting", SETTINGS)
def test_values_are_exact(setting: str, backend: str) -> None:
    """Against fp64; on a processor whose oneDNN rounds (Intel's AMX) this fails without the guard."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.standard_normal((300, 128)).astype(np.float32))
    y = torch.from_numpy(rng.integers(9, size=300))
    SETTINGS[setting]()
    check(backend, x, y, margin_plus=0.1, margin_minus=0.05, precision="fp32")
    check(backend, x.half(), y, margin_plus=0.1, margin_minus=0.05)
    check(backend, x[:100], y[:100], x, y, margin_plus=0.1, margin_minus=0.05, precision="fp32", row_offset=0)


@pytest.mark.parametrize("name", ["ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE"])
@pytest.mark.parametrize(("mode", "rounds"), [("BF16", True), ("any", True), ("STRICT", False), (None, False)])
def test_environment_of_onednn(name: str, mode: str | None, rounds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read once, by oneDNN and here."""
    numerics._onednn_rounds_by_default.cache_clear()
    if mode is not None:
        monkeypatch.setenv(name, mode)
    products = Products(monkeypatch)
    dtypes: list[torch.dtype] = []
    watched: Any = torch.Tensor.__matmul__

    def noted(a: Tensor, b: Tensor) -> Any:
        dtypes.append(a.dtype)
        return watched(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", noted)
    assert product(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
    assert (dtypes, len(products.seen)) == ([torch.float64 if rounds else torch.float32], 1)
    numerics._onednn_rounds_by_default.cache_clear()


# On CUDA, where the setting itself is changed for a while.


@pytest.mark.parametrize("threads", [1, 4])
def test_setting_of_cuda_with_threads(threads: int) -> None:
    """Exact while any is inside, and back when all have left, one of them by an error."""
    torch.set_float32_matmul_precision("high")
    before, barrier, seen = everything(), threading.Barrier(threads), []

    def work(number: int) -> None:
        for turn in range(20):
            barrier.wait()
            with contextlib.suppress(ValueError), as_precise_as_asked("cuda", False):
                for _ in range(1 + 10 * ((number + turn) % threads)):  # they leave in turn
                    seen.append(BACKENDS.cuda.matmul.fp32_precision)
                raise ValueError

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert set(seen) == {"ieee"}
    assert everything() == before


def test_setting_of_cuda_that_is_inherited_stays_so() -> None:
    BACKENDS.fp32_precision = "tf32"
    with as_precise_as_asked("cuda", False):
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == "tf32"
    BACKENDS.fp32_precision = "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == "ieee"


def test_setting_of_cuda_changed_by_another_thread_meanwhile() -> None:
    """Who enters then has it exact again, and the newer one is put back."""
    with as_precise_as_asked("cuda", False):
        BACKENDS.cuda.matmul.fp32_precision = "tf32"
        with as_precise_as_asked("cuda", False):
            assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
        assert BACKENDS.cuda.matmul.fp32_precision == "ieee"
    assert BACKENDS.cuda.matmul.fp32_precision == "tf32"


# Defaults.


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_defaults_change_nothing(backend: str, call: str) -> None:
    """Default dtype and device, deterministic algorithms, denormals flushed to zero."""
    expected = public_calls(backend)[call]()
    for dtype in (torch.float64, torch.float16):
        torch.set_default_dtype(dtype)
        torch.set_default_device("meta")
        torch.use_deterministic_algorithms(True)
        torch.set_flush_denormal(True)
        try:
            found = public_calls(backend)[call]()
        finally:
            torch.set_flush_denormal(False)
            torch.use_deterministic_algorithms(False)
            torch.set_default_device(None)
            torch.set_default_dtype(torch.float32)
        for a, b in zip(found, expected, strict=True):
            if isinstance(a, Tensor):
                assert (a.dtype, a.device) == (b.dtype, b.device)
            np.testing.assert_array_equal(a, b)


# A device without float64; the CPU stands in for it.


class NoFloat64(TorchDispatchMode):
    """Raises where an operation makes a float64 tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} made a float64 tensor")
        return result


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also inside the operators of plain PyTorch, which a mode outside sees as one operation each."""
    monkeypatch.setattr(numerics, "has_float64", lambda device: False)

    @contextlib.contextmanager
    def watched(*arguments: Any) -> Iterator[None]:
        with as_precise_as_asked(*arguments), NoFloat64():
            yield

    for module in (blocked, blocked_counts):
        monkeypatch.setattr(module, "as_precise_as_asked", watched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_no_call_needs_float64(call: str, dtype: torch.dtype, no_float64: None) -> None:
    """Nor with float64 as the default dtype; and it is right nearly as it is with float64."""
    torch.set_default_dtype(dtype)
    with NoFloat64():
        found = public_calls("torch")[call]()
    for value in found:
        assert torch.as_tensor(value).isfinite().all()


def test_the_stand_in_has_no_float64() -> None:
    for make in (lambda: torch.zeros(2).double(), lambda: torch.tensor(1.0, dtype=torch.float64)):
        with NoFloat64(), pytest.raises(TypeError, match="float64"):
            make()
