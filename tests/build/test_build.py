"""The build: whether there are CUDA kernels, and for which GPUs; and a library that loads without CUDA."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

import tcm_fused
from tcm_fused import _C, tcm_loss
from tcm_fused.backends import choice

ROOT = Path(__file__).parents[2]
BUILT = _C.build_info()
with_cuda = pytest.mark.skipif(not BUILT["cuda_architectures"], reason=f"no CUDA kernels: {BUILT['cuda_compiler']}")


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """setup.py as a module, which builds nothing, in an environment that says nothing; it writes to another folder."""
    for name in ("TCM_FUSED_EXTENSION", "TCM_FUSED_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    module = load(monkeypatch)
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    (tmp_path / "root").mkdir()
    module.cuda.cache_clear()
    module.compiler.cache_clear()
    return module


def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("CXX", os.environ.get("CXX", ""))  # so that what setup.py says there is undone
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_tcm_fused", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def program(path: Path, script: str) -> str:
    """A shell script as a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def fake_nvcc(home: Path, version: str = "12.6.85", report: str = "") -> str:
    """`home` as CUDA_HOME, whose nvcc does not know sm_100, and compiles to nothing with a report."""
    (home / "lib").mkdir(parents=True, exist_ok=True)
    (home / "lib/libcudart_static.a").touch()
    (home / "report").write_text(report)
    script = f"""
case "$1" in
  --version) echo "Cuda compilation tools, release {version.rpartition(".")[0]}, V{version}" ;;
  --list-gpu-code) echo sm_80; echo sm_86; echo sm_89; echo sm_90 ;;
  --dryrun) echo '#$ LIBRARIES="-L{home}/none" "-L{home}/lib"'; echo '#$ INCLUDES="-I{home}/include"' ;;
  *) for target; do :; done; touch "$target"; echo "$@" >> {home}/calls; cat {home}/report ;;
esac"""
    program(home / "bin/nvcc", script)
    return str(home)


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    return fake_nvcc(tmp_path / "cuda")


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
    assert (build.nvcc, build.name) == (f"{nvcc}/bin/nvcc", "nvcc 12.6.85")
    assert (build.includes, build.runtime) == ((f"{nvcc}/include",), f"{nvcc}/lib/libcudart_static.a")
    said = capsys.readouterr().out
    assert ("no CUDA kernels for compute capability 7.5" in said) == ("7.5" in wish)
    assert (f"no CUDA kernels for compute capability 10.0+PTX, which {build.nvcc} does not know yet" in said) == (
        not wish
    )


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
    """With an error that says which value came, which are wanted, and the remedy."""
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
    monkeypatch.setattr(setup, "compiler", lambda: setup.Compiler("/bin/g++", "g++ 12"))
    (setup.ROOT / "csrc").symlink_to(ROOT / "csrc")
    extension = setup.extension()
    assert not [source for source in extension.sources if "cuda" in source]
    assert ("TCM_CUDA_COMPILER", f'"{reason}"') in extension.define_macros
    assert ("TCM_CUDA_ARCHITECTURES", '""') in extension.define_macros


@pytest.mark.parametrize("version", ["11.8.89", "12.0.140", "12.4.131"])
def test_cuda_too_old(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "old", version))
    with pytest.raises(SystemExit, match=rf"need CUDA 12\.5 or later, {tmp_path}/old/bin/nvcc is of {version}") as left:
        setup.cuda()
    assert "CUDA_HOME" in str(left.value)
    assert "TCM_FUSED_CUDA=0" in str(left.value)


@pytest.mark.parametrize("version", ["12.5.40", "12.10.1", "13.0.88", "14.0.1"])
def test_cuda_new_enough(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "new", version))
    assert setup.cuda().name == f"nvcc {version}"


# ptxas' report on two kernels as nvcc gives it, with everything that is worth a word in it.
ROUTINE = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN3tcm4cudaEv' for 'sm_90a'
ptxas info    : Function properties for _ZN3tcm4cudaEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 16 bytes smem
ptxas info    : Compile time = 12.345 ms

"""
WORTH_A_WORD = [
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to...",
    "ptxas info    : (C7509) Potential Performance Loss: setmaxnreg ignored to maintain minimum register requirement",
    "ptxas warning : Registers are spilled to local memory in function '_ZN3tcm4cudaEv', 8 bytes spill stores",
    "ptxas /tmp/a.ptx, line 12; warning : Advisory: Modifier '.sp' on instruction 'mma' may have reduced performance",
    "nvcc warning : Support for offline compilation for architectures prior to sm_75 will be removed",
    'csrc/cuda/loss.cu(12): warning #177-D: variable "n" was declared but never referenced',
    "    16 bytes stack frame, 8 bytes spill stores, 8 bytes spill loads",
    "    int n = 0;",
]


@pytest.mark.parametrize("report", ["", ROUTINE, *WORTH_A_WORD, "\n".join(WORTH_A_WORD)])
def test_advice_of_ptxas_is_shown(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, report: str
) -> None:
    """Warnings and advice, when compiled and when not compiled again; the routine of its report stays in the .log."""
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "cuda", report=f"{ROUTINE}{report}\n{ROUTINE}"))
    (setup.ROOT / "csrc/cuda").mkdir(parents=True)
    (setup.ROOT / "csrc/cuda/loss.cu").touch()
    build = setup.cuda()
    for calls in (1, 1):
        capsys.readouterr()
        [compiled] = setup.compile_kernels(build)
        expected = [line for line in report.splitlines() if report != ROUTINE]
        assert capsys.readouterr().out.splitlines() == expected
        assert "Used 168 registers" in compiled.with_suffix(".log").read_text()
        assert len((tmp_path / "cuda/calls").read_text().splitlines()) == calls


def test_kernels_that_do_not_compile(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """All that nvcc says, and the way without; nothing is left that a second build would take for compiled."""
    monkeypatch.setenv("CUDA_HOME", fake_nvcc(tmp_path / "cuda", report="csrc/cuda/loss.cu(1): error: oh"))
    (setup.ROOT / "csrc/cuda").mkdir(parents=True)
    (setup.ROOT / "csrc/cuda/loss.cu").touch()
    build = setup.cuda()
    script = tmp_path / "cuda/bin/nvcc"
    script.write_text(script.read_text().replace(f"cat {tmp_path}/cuda/report", f"cat {tmp_path}/cuda/report; exit 1"))
    for _ in range(2):
        with pytest.raises(SystemExit, match=r"could not compile .*loss\.cu; TCM_FUSED_CUDA=0"):
            setup.compile_kernels(build)
        assert "error: oh" in capsys.readouterr().out


# The C++ compiler.


@pytest.mark.parametrize(
    "command",
    [
        "FOLDER/launcher FOLDER/g++",
        "env WORD=1 FOLDER/g++",
        "env 'WORD=two words' FOLDER/launcher FOLDER/g++ -m64",
        "'FOLDER/with spaces/g++'",
        '"FOLDER/with spaces/g++" -m64',
        "FOLDER/with\\ spaces/g++",
        "  FOLDER/g++  ",
        "FOLDER/g++",
        "g++",
        "",
    ],
)
def test_compilers(setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """CXX as a shell reads it, and one program from it, which passes its arguments on as they are."""
    for folder in (tmp_path, tmp_path / "with spaces"):
        program(folder / "g++", f'echo "$WORD|$0|$@" >> {tmp_path}/calls; echo g++ fake 1; echo more')
    program(tmp_path / "launcher", 'exec "$@"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", command.replace("FOLDER", str(tmp_path)))
    found = setup.compiler()
    assert found.name == "g++ fake 1"
    subprocess.run([found.program, "-c", "a b.cpp", "it's"], check=True)
    word, path, arguments = (tmp_path / "calls").read_text().splitlines()[-1].split("|")
    assert word == ("two words" if "two words" in command else "1" if "WORD" in command else "")
    assert path == str(tmp_path / ("with spaces/g++" if "spaces" in command else "g++"))
    assert arguments == ("-m64 " if "m64" in command else "") + "-c a b.cpp it's"
    assert " " not in found.program


def test_another_command_is_another_program(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the build sees that everything is to be compiled anew."""
    programs = set()
    for command in ("env A=1 g++", "env A=2 g++", "g++"):
        monkeypatch.setenv("CXX", command)
        setup.compiler.cache_clear()
        programs.add(setup.compiler().program)
    assert len(programs) == 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("FOLDER/none", ["FOLDER/none' was not found", "install g++", "CXX"]),
        ("FOLDER/with spaces/g++", ["FOLDER/with' was not found", "quote a path with spaces"]),
        ("FOLDER/old", ["FOLDER/old' fails at -std=c++20 (unrecognized option)", "g++ 10"]),
        ("env FOLDER/none", ["env FOLDER/none' fails at -std=c++20", "No such file"]),
        ("FOLDER/mute", ["FOLDER/mute' fails at -std=c++20 (without a word)"]),
        ("'FOLDER/g++", ["cannot be read as a shell would (No closing quotation)", "quotes"]),
        ("''", ["was not found"]),
        ("FOLDER", ["FOLDER' was not found"]),
    ],
)
def test_compilers_refused(
    setup: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    """With the way out that needs none."""
    program(tmp_path / "old", "echo unrecognized option; exit 1")
    program(tmp_path / "mute", "exit 3")
    monkeypatch.setenv("CXX", command.replace("FOLDER", str(tmp_path)))
    with pytest.raises(SystemExit) as left:
        setup.compiler()
    for word in (*words, *(() if "quotes" in words else ("C++20 compiler", "TCM_FUSED_EXTENSION=0"))):
        assert word.replace("FOLDER", str(tmp_path)) in str(left.value)


def test_without_headers_of_python(setup: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(SystemExit, match=r"Python\.h.*python3-dev.*TCM_FUSED_EXTENSION=0"):
        setup.compiler()


def test_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"install torch and pybind11 first.*TCM_FUSED_EXTENSION=0"):
        load(monkeypatch)


@pytest.mark.parametrize("name", ["TCM_FUSED_EXTENSION", "TCM_FUSED_CUDA"])
def test_unknown_wishes(setup: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "no")
    with pytest.raises(SystemExit, match=f"{name}='no' is not known; choose one of .*'0'"):
        load(monkeypatch).cuda()


# Distributions. Built without the extension, which takes a second.


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the project in which an extension was built, and once a module that is no more."""
    ignored = shutil.ignore_patterns(".*", "build", "out", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "tree", ignore=ignored)
    stale = tmp_path / "tree/build/lib/tcm_fused/opis.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    return tmp_path / "tree"


def build(tree: Path, kind: str, **environment: str) -> Path:
    """The `kind` that a build frontend makes of the project; nothing but Python is on the PATH."""
    script = f"""
import sys
sys.modules.update(torch=None, pybind11=None)
from setuptools import build_meta
print()
print(build_meta.build_{kind}({str(tree.parent)!r}))
"""
    environment = {"PATH": "", "TCM_FUSED_EXTENSION": "0", **environment}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tree.parent / done.stdout.splitlines()[-1]


def test_wheel_without_the_extension(tree: Path) -> None:
    """No compiler, torch or pybind11 needed; for any Python and machine; the package alone, as it is now."""
    wheel = build(tree, "wheel")
    assert wheel.name == f"tcm_fused-{tcm_fused.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    expected = {
        path.relative_to(tree).as_posix() for path in tree.glob("tcm_fused/**/*") if path.suffix in (".py", ".pyi")
    }
    assert {name for name in names if ".dist-info/" not in name} == {*expected, "tcm_fused/py.typed"}
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy"]


def test_source_distribution(tree: Path) -> None:
    """Everything that a build needs, and no more; a wheel can be made of it."""
    archive = build(tree, "sdist")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
        tar.extractall(tree.parent / "unpacked", filter="data")
    needed = {path.relative_to(tree).as_posix() for path in tree.glob("csrc/**/*") if path.is_file()}
    assert needed
    assert {*needed, "pyproject.toml", "setup.py", "README.md", "LICENSE", "tcm_fused/_C.pyi"} <= names
    assert not [name for name in names if re.match(r"tests|benchmarks|build|.*\.so$", name)]
    again = build(tree.parent / "unpacked" / archive.name.removesuffix(".tar.gz"), "wheel")
    with zipfile.ZipFile(again) as wheel, zipfile.ZipFile(build(tree, "wheel")) as direct:
        assert wheel.namelist() == direct.namelist()


def test_no_folder_of_this_machine_in_the_library() -> None:
    """A wheel is for others: paths in it are relative."""
    contents = Path(_C.__file__).read_bytes()
    folders = {str(ROOT), str(Path(torch.__file__).parents[1]), str(Path.home())}
    assert not [folder for folder in folders if folder.encode() in contents]
    assert b"csrc/cpu/" in contents


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
    """Then a tensor on the CPU is wrong, or a dtype; "auto" takes the kernel, for float64 the blocked form."""
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
