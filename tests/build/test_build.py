"""The build: what decides whether there are CUDA kernels and for which GPUs, and a library that loads without CUDA."""

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from tcm_fused import _C, tcm_loss
from tcm_fused.backends import choice

ROOT = Path(__file__).parents[2]
BUILT = _C.build_info()
with_cuda = pytest.mark.skipif(not BUILT["cuda_architectures"], reason=f"no CUDA kernels: {BUILT['cuda_compiler']}")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Any:
    """setup.py as a module, which builds nothing, in an environment that says nothing about CUDA."""
    for name in ("TCM_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_tcm_fused", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.cuda.cache_clear()
    return module


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A folder to be CUDA_HOME, whose nvcc answers as one of version 12.4 would: it does not know sm_100."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libcudart_static.a").touch()
    (tmp_path / "bin").mkdir()
    script = f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  --list-gpu-code) echo sm_80; echo sm_86; echo sm_89; echo sm_90 ;;
  --dryrun) echo '#$ LIBRARIES="-L{tmp_path}/none" "-L{tmp_path}/lib"'; echo '#$ INCLUDES="-I{tmp_path}/include"' ;;
esac
"""
    (tmp_path / "bin/nvcc").write_text(script)
    (tmp_path / "bin/nvcc").chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("wish", "architectures"),
    [
        ("", ["sm_80", "sm_90a"]),  # of the default, those that this nvcc knows
        ("8.6;9.0+PTX", ["sm_86", "sm_90a", "compute_90"]),
        ("9.0a", ["sm_90a"]),
        ("7.0 7.5 8.0, 8.9+PTX", ["sm_80", "sm_89", "compute_89"]),
    ],
)
def test_architectures(
    setup: Any, nvcc: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, wish: str, architectures: list[str]
) -> None:
    monkeypatch.setenv("CUDA_HOME", nvcc)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wish)
    build = setup.cuda()
    assert build.architectures == tuple(architectures)
    assert (build.nvcc, build.name) == (f"{nvcc}/bin/nvcc", "nvcc 12.4.131")
    assert (build.includes, build.runtime) == ((f"{nvcc}/include",), f"{nvcc}/lib/libcudart_static.a")
    assert ("no CUDA kernels for compute capability 7.5" in capsys.readouterr().out) == ("7.5" in wish)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, ["TORCH_CUDA_ARCH_LIST", "'Hopper' is not understood", "8.0"]),
        ({"TORCH_CUDA_ARCH_LIST": "12.0"}, ["TORCH_CUDA_ARCH_LIST", "does not know sm_120"]),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, ["leaves nothing", "'8.0'", "TCM_FUSED_CUDA=0"]),
        ({"TCM_FUSED_CUDA": "yes"}, ["TCM_FUSED_CUDA='yes'", "'auto', '0', '1'"]),
        (
            {"CUDA_HOME": "/nowhere", "PATH": "/bin", "TCM_FUSED_CUDA": "1"},
            ["nvcc was not found", "/nowhere", "install"],
        ),
    ],
)
def test_refused(
    setup: Any, nvcc: str, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: list[str]
) -> None:
    """With an error that says what came, what is wanted and what to do."""
    for name, value in {"CUDA_HOME": nvcc, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as left:
        setup.cuda()
    for word in words:
        assert word in str(left.value)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"TCM_FUSED_CUDA": "0"}, "TCM_FUSED_CUDA was 0"),
        ({"PATH": "/bin"}, "nvcc was not found in CUDA_HOME=(not set) nor on the PATH"),
        ({"PATH": "/bin", "TCM_FUSED_CUDA": "auto"}, "nvcc was not found in CUDA_HOME=(not set) nor on the PATH"),
    ],
)
def test_without_cuda(setup: Any, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], reason: str) -> None:
    """No error, and a reason that the extension will tell; its sources are those for the CPU."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert setup.cuda() == reason
    monkeypatch.setattr(setup, "compiler", lambda: "g++")
    extension = setup.extension()
    assert not [source for source in extension.sources if "cuda" in source]
    assert ("TCM_CUDA_COMPILER", f'"{reason}"') in extension.define_macros
    assert ("TCM_CUDA_ARCHITECTURES", '""') in extension.define_macros


@with_cuda
def test_library_needs_no_cuda() -> None:
    """It names no library of CUDA, keeps its CUDA runtime to itself, and takes the stream of a torch that has one."""
    path = _C.__file__
    needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    libraries = re.findall(r"Shared library: \[(.+?)\]", needed)
    assert "libtorch.so" in libraries
    assert not [name for name in libraries if "cuda" in name]
    symbols = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"\bcu(?:da)?[A-Z]\w*| [TDBVW] \w*[Cc]uda\w*", symbols)
    assert re.search(r" w aoti_torch_get_current_cuda_stream", symbols)


def test_build_facts() -> None:
    architectures = BUILT["cuda_architectures"].split()
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in architectures)
    assert BUILT["cuda_compiler"].startswith("nvcc 1") == bool(architectures)
    assert hasattr(_C, "cuda_runtime_error") == bool(architectures)


# Why there is no CUDA backend.


@pytest.fixture
def fresh() -> Any:
    """`why_unavailable` asks anew, and forgets what it was told here."""
    choice._why_no_cuda.cache_clear()
    yield
    choice._why_no_cuda.cache_clear()


def pretend(patch: pytest.MonkeyPatch, architectures: str, gpus: list[tuple[int, int]], error: str = "") -> None:
    """An extension built for `architectures` beside a torch with CUDA that sees `gpus`."""
    facts = {
        **BUILT,
        "cuda_architectures": architectures,
        "cuda_compiler": "nvcc 13.0.88" if architectures else "TCM_FUSED_CUDA was 0",
    }
    patch.setattr(_C, "build_info", lambda: facts)
    patch.setattr(_C, "cuda_runtime_error", lambda: error, raising=False)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    patch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("architectures", "gpus", "error", "words"),
    [
        ("", [(9, 0)], "", ["built without CUDA kernels (TCM_FUSED_CUDA was 0)", "TCM_FUSED_CUDA=1 pip install"]),
        ("sm_80", [], "", ["torch sees no GPU"]),
        ("sm_80", [(8, 0)], "driver is too old", ["nvcc 13.0.88", "driver is too old", "update the driver"]),
        ("sm_80 sm_90a", [(7, 5), (7, 0)], "", ["built for sm_80 sm_90a", "7.5, 7.0", "TORCH_CUDA_ARCH_LIST"]),
        ("sm_80 sm_90a", [(10, 0)], "", ["compute capability here is 10.0"]),
        ("sm_90a", [(8, 0)], "", ["compute capability here is 8.0"]),
        ("sm_86", [(8, 0)], "", ["compute capability here is 8.0"]),
    ],
)
def test_reasons(
    monkeypatch: pytest.MonkeyPatch, architectures: str, gpus: list[tuple[int, int]], error: str, words: list[str]
) -> None:
    pretend(monkeypatch, architectures, gpus, error)
    with pytest.raises(RuntimeError) as caught:
        tcm_loss(torch.ones(4, 2), torch.arange(4), backend="cuda")
    for word in ("backend='cuda' is not available", "backend='torch'", *words):
        assert word in str(caught.value)


@pytest.mark.usefixtures("fresh")
def test_reason_of_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "sm_80", [])
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = choice.why_unavailable("cuda")
    assert reason is not None
    assert f"torch {torch.__version__} has no CUDA" in reason


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("architectures", "gpu"),
    [
        ("sm_80", (8, 0)),
        ("sm_80", (8, 9)),
        ("sm_80 sm_90a", (9, 0)),
        ("sm_80 sm_90a sm_100 compute_100", (12, 0)),
        ("compute_80", (9, 0)),
    ],
)
def test_no_reason(monkeypatch: pytest.MonkeyPatch, architectures: str, gpu: tuple[int, int]) -> None:
    """Then a tensor on the CPU is what is wrong, or a dtype; "auto" takes the kernel, for float64 the blocked form."""
    pretend(monkeypatch, architectures, [(7, 0), gpu])
    with pytest.raises(RuntimeError, match="backend='cuda' needs tensors on device 'cuda', embeddings are on 'cpu'"):
        tcm_loss(torch.ones(4, 2), torch.arange(4), backend="cuda")
    assert choice.choose("auto", "cuda", torch.bfloat16) == "cuda"
    assert choice.choose("auto", "cuda", torch.float64) == "torch"
    with pytest.raises(RuntimeError, match="no float64 kernels; use backend='torch'"):
        choice.choose("cuda", "cuda", torch.float64)


@with_cuda
def test_operator_refuses_memory_of_the_cpu() -> None:
    """Reached around the dispatcher: an error, before anything is asked of a driver."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    loss, sides = torch.ops.tcm_fused.loss.default, torch.ones(2, dtype=torch.float64)
    options = (None, sides, sides, False, False, True, False)
    with pytest.raises(RuntimeError, match="embeddings must be on the CUDA device"):
        loss.redispatch(keys, torch.ones(4, 2), torch.arange(4), None, None, *options)
    with pytest.raises(RuntimeError, match=r"embeddings must be \[N, D\]"):
        loss.redispatch(keys, torch.ones(4), torch.arange(4), None, None, *options)
