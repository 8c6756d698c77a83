"""Builds tcm_fused._C, the C++ and CUDA extension. Everything else is in pyproject.toml. The environment decides:

TCM_FUSED_EXTENSION   1: with the extension (the default); 0: Python alone, for the backends 'torch' and 'triton'; no
                      compiler is needed then, nor torch to be there first
TCM_FUSED_CUDA        auto: with CUDA kernels if nvcc is found (the default); 1: with them or not at all; 0: without
TORCH_CUDA_ARCH_LIST  architectures they are compiled for, as torch writes them; the default is "8.0;9.0a;10.0+PTX"
CUDA_HOME             nvcc is CUDA_HOME/bin/nvcc if that is there, else the one on the PATH; CUDA 12.5 or later
CXX                   the C++ compiler (g++), which is nvcc's host compiler too; as a shell reads it: "ccache g++"
MAX_JOBS              how many compilers may run at once (2)

No GPU is asked for. `python setup.py build_cuda` compiles the kernels alone and prints where ptxas' reports are.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from typing import ClassVar, NamedTuple

from setuptools import Command, setup
from setuptools.command.build import build as BuildAll


def chosen(name: str, *choices: str) -> str:
    """The value of `name` in the environment, or the first of `choices`."""
    wish = os.environ.get(name) or choices[0]
    if wish not in choices:
        raise SystemExit(f"{name}={wish!r} is not known; choose one of {', '.join(map(repr, choices))}")
    return wish


WITH_EXTENSION = chosen("TCM_FUSED_EXTENSION", "1", "0") == "1"
WAY_OUT = "or set TCM_FUSED_EXTENSION=0, which installs Python alone, for the backends 'torch' and 'triton'"
BuildExtension = Command  # in the place of torch's, where nothing is compiled
if WITH_EXTENSION:
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"tcm_fused is built against the torch you run it with ({error}): install torch and pybind11 first, then "
            f"`pip install --no-build-isolation .`; {WAY_OUT}"
        ) from error

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # operators use nothing that torch 2.11 lacks
ARCHITECTURES = "8.0;9.0a;10.0+PTX"
NVCC_OPTIONS = (
    "-std=c++20",
    "-O3",
    "-Xptxas=-v",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
)
OLDEST = 80  # the kernels need cp.async and mma.sync m16n8k16
OLDEST_CUDA = "12.5"  # for cudaGetDriverEntryPointByVersion; C++20 and sm_90a would do with 12.0
# Of ptxas' report on each kernel, the lines that need nobody's attention.
ROUTINE = re.compile(
    r"(ptxas info +: )?(\d+ bytes gmem|Compiling entry function|Function properties for|Used \d+ registers).*|"
    r"    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads|\s*"
)
JOBS = os.environ.setdefault("MAX_JOBS", "2")  # torch reads it as well


class Compiler(NamedTuple):
    """The C++ compiler, as one program."""

    program: str  # a path
    name: str  # with version


@cache
def compiler() -> Compiler:
    """That of CXX; an error says how to install one if there is none.

    CXX may be several words, as a shell reads them: a launcher before the compiler, options behind it. torch and nvcc
    want a single program, so these get a script.
    """
    wish = os.environ.get("CXX") or "g++"
    try:
        words = shlex.split(wish)
    except ValueError as error:
        raise SystemExit(f"CXX={wish!r} cannot be read as a shell would ({error}); correct its quotes") from error
    program = shutil.which(words[0]) if words else None
    if program is None:
        missing = words[0] if words else wish
        raise SystemExit(
            f"tcm_fused needs a C++20 compiler: '{missing}' was not found; install g++, set CXX to another (quote a "
            f"path with spaces), {WAY_OUT}"
        )
    program = str(Path(program).absolute())
    if [wish] != words:
        program = script(f'exec {shlex.join([program, *words[1:]])} "$@"')
    said, failed = run(program, "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull)
    if failed:
        raise SystemExit(
            f"tcm_fused needs a C++20 compiler: '{wish}' fails at -std=c++20 ({said.strip() or 'without a word'}); "
            f"install g++ 10 or later, set CXX to another, {WAY_OUT}"
        )
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise SystemExit(f"tcm_fused needs Python's headers (Python.h): install python3-dev, {WAY_OUT}")
    return Compiler(program, run(program, "--version")[0].splitlines()[0])


def script(command: str) -> str:
    """A shell script with this command, by a path that is the command's alone: another one compiles everything anew."""
    folder = ROOT / "build" / "cxx" / hashlib.sha256(command.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return str(path)


def run(*command: str) -> tuple[str, int]:
    """The output of `command`, on either stream, and its exit status."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.stdout, done.returncode


class Cuda(NamedTuple):
    """The compiler of the CUDA kernels, and the GPUs they are compiled for."""

    nvcc: str
    name: str  # with version
    architectures: tuple[str, ...]  # "sm_80": machine code; "compute_100": PTX, for that and later ones
    includes: tuple[str, ...]
    runtime: str  # the static library


@cache
def cuda() -> Cuda | str:
    """nvcc, or why there are to be no CUDA kernels."""
    wish = chosen("TCM_FUSED_CUDA", "auto", "0", "1")
    if wish == "0":
        return "TCM_FUSED_CUDA was 0"
    home = os.environ.get("CUDA_HOME", "")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    if not nvcc:
        reason = f"nvcc was not found in CUDA_HOME={home or '(not set)'} nor on the PATH"
        if wish == "1":
            raise SystemExit(f"TCM_FUSED_CUDA=1, but {reason}: install the CUDA toolkit, or set CUDA_HOME")
        return reason
    version = re.search(r"V(\d+)\.(\d+)\.\d+", run(nvcc, "--version")[0])
    if version is None:
        raise SystemExit(f"'{nvcc} --version' does not give a version; set CUDA_HOME to another, or TCM_FUSED_CUDA=0")
    if [int(version[1]), int(version[2])] < [int(number) for number in OLDEST_CUDA.split(".")]:
        raise SystemExit(
            f"the CUDA kernels need CUDA {OLDEST_CUDA} or later, {nvcc} is of {version[0][1:]}: install a later one, "
            "set CUDA_HOME to it, or set TCM_FUSED_CUDA=0, which leaves the kernels out"
        )
    plan = run(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull)[0]  # nvcc knows best where its own files are
    libraries = [Path(folder, "libcudart_static.a") for folder in re.findall(r'"-L([^"]+)"', plan)]
    runtime = next((path for path in libraries if path.exists()), None)
    if runtime is None:
        raise SystemExit(f"{nvcc} has no CUDA runtime ({libraries} are not there); install it, or set TCM_FUSED_CUDA=0")
    includes = tuple(dict.fromkeys(re.findall(r'"-I([^"]+)"', plan)))
    return Cuda(nvcc, f"nvcc {version[0][1:]}", architectures(nvcc), includes, str(runtime))


def architectures(nvcc: str) -> tuple[str, ...]:
    """TORCH_CUDA_ARCH_LIST as nvcc names them, less those that are too old for the kernels.

    Hopper is always compiled as sm_90a, which every Hopper GPU runs and whose instructions the kernels use.
    """
    wish = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    known = run(nvcc, "--list-gpu-code")[0].split()
    found: dict[str, None] = {}
    for entry in re.split(r"[;,\s]+", (wish or ARCHITECTURES).strip()):
        parts = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if parts is None:
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST={wish!r}: {entry!r} is not understood; give numbers, as in {ARCHITECTURES!r}"
            )
        number = parts[1] + parts[2]
        if int(number) < OLDEST:
            print(f"tcm_fused: no CUDA kernels for compute capability {entry}, they need {OLDEST / 10} or later")
        elif f"sm_{number}" in known:
            found[f"sm_{number}{'a' if number == '90' else parts[3]}"] = None
            if parts[4]:
                found[f"compute_{number}"] = None
        elif wish:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST={wish!r}: {nvcc} does not know sm_{number}; it knows {known}")
        else:
            print(f"tcm_fused: no CUDA kernels for compute capability {entry}, which {nvcc} does not know yet")
    if not found:
        raise SystemExit(
            f"TORCH_CUDA_ARCH_LIST={wish!r} leaves nothing to compile CUDA kernels for; add '8.0' or a later one, or "
            "set TCM_FUSED_CUDA=0"
        )
    return tuple(found)


def compile_kernels(build: Cuda) -> list[Path]:
    """The objects of csrc/cuda/*.cu, each with ptxas' report beside it as .log; nothing is compiled twice.

    No header of torch is read, so that any torch will do, one without CUDA too. nvcc itself runs as many compilers at
    once as there may be, one for each architecture.
    """
    folder = ROOT / "build" / "cuda" / "-".join(build.architectures)
    folder.mkdir(parents=True, exist_ok=True)
    command = [build.nvcc, f"-ccbin={compiler().program}", *NVCC_OPTIONS]
    for name in build.architectures:
        command.append(f"-gencode=arch={name.replace('sm_', 'compute_')},code={name}")
    sources = sorted(path for path in ROOT.glob("csrc/**/*") if path.suffix in (".cu", ".cuh", ".h"))
    state = hashlib.sha256(repr((build, command)).encode())
    for path in sources:
        state.update(path.name.encode() + b"\0" + path.read_bytes())
    objects = []
    for source in (path for path in sources if path.suffix == ".cu"):
        target = folder / f"{source.stem}.o"
        objects.append(target)
        log, made_from = target.with_suffix(".log"), target.with_suffix(".sha256")
        if not (target.exists() and made_from.exists() and made_from.read_text() == state.hexdigest()):
            made_from.unlink(missing_ok=True)
            report, failed = run(*command, f"--threads={JOBS}", "-c", str(source), "-o", str(target))
            if failed:
                print(report)
                raise SystemExit(f"nvcc could not compile {source}; TCM_FUSED_CUDA=0 builds without CUDA kernels")
            log.write_text("".join(line for line in report.splitlines(True) if "Compile time" not in line))
            made_from.write_text(state.hexdigest())
        for line in filter(remarkable, log.read_text().splitlines()):
            print(line)
    return objects


def remarkable(line: str) -> bool:
    """Whether a line of nvcc's report is a warning, ptxas' advice on performance (C75..) or a spill."""
    return ROUTINE.fullmatch(line) is None


class BuildCuda(Command):
    """The kernels alone: `python setup.py build_cuda`."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self) -> None:
        """There are none."""

    def finalize_options(self) -> None:
        """There are none."""

    def run(self) -> None:
        """Compile, and print where the reports are; SystemExit if there are to be no CUDA kernels."""
        build = cuda()
        if isinstance(build, str):
            raise SystemExit(f"no CUDA kernels: {build}")
        print(build.name, *(path.with_suffix(".log") for path in compile_kernels(build)), sep="\n")


class CleanBuild(BuildAll):
    """A build of the present modules alone: setuptools would add those of earlier builds, since moved or deleted."""

    def run(self) -> None:
        """Remove the folder of earlier builds first."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Build(BuildExtension):
    """The extension, its CUDA kernels first."""

    def build_extensions(self) -> None:
        """Compile the CUDA kernels, if there are to be any, and then the extension with them."""
        build = cuda()
        if isinstance(build, Cuda):
            print(f"tcm_fused: CUDA kernels with {build.name} for {' '.join(build.architectures)}")
            self.extensions[0].extra_objects += [*map(str, compile_kernels(build)), build.runtime]
        else:
            print(f"tcm_fused: no CUDA kernels: {build}")
        print(f"tcm_fused: CPU kernels with {compiler().name}, torch {torch.__version__} (stable ABI 2.11)")
        self.force = True  # setuptools looks at the age of files alone; ninja knows which flags and headers changed
        super().build_extensions()


def sources_header() -> Path:
    """A header with the digest of the sources, by which a clone knows its extension; in a folder of its own.

    Not a macro on the command line, which would compile every file anew. `tcm_fused.backends.extension` takes it too.
    """
    state = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            state.update(path.relative_to(ROOT / "csrc").as_posix().encode() + b"\0" + path.read_bytes())
    header = ROOT / "build" / "include" / "tcm_sources.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    line = f'#define TCM_SOURCES "{state.hexdigest()[:16]}"\n'
    if not header.exists() or header.read_text() != line:
        header.write_text(line)
    return header


def extension() -> "CppExtension":
    """The extension as setuptools takes it."""
    build = cuda()
    os.environ["CXX"] = compiler().program  # for torch and setuptools
    with_cuda = isinstance(build, Cuda)
    sources = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.cpp"))
    return CppExtension(
        "tcm_fused._C",
        sources=[str(path) for path in sources if with_cuda or "cuda" not in path.parts],
        # pybind11 before torch 2.11's copy, which refuses a stable ABI.
        include_dirs=[pybind11.get_include(), str(sources_header().parent)],
        define_macros=[
            ("TORCH_STABLE_ONLY", None),
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("TCM_COMPILER", f'"{compiler().name}"'),
            ("TCM_TORCH_VERSION", f'"{torch.__version__}"'),
            ("TCM_CUDA", int(with_cuda)),
            ("TCM_CUDA_COMPILER", f'"{build.name if with_cuda else build}"'),
            ("TCM_CUDA_ARCHITECTURES", f'"{" ".join(build.architectures) if with_cuda else ""}"'),
        ],
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-fopenmp-simd",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            # No folder of this machine in the library: neither by debug information nor by __FILE__ in messages.
            "-g0",
            f"-ffile-prefix-map={ROOT.resolve()}/=",
            f"-ffile-prefix-map={Path(torch.__file__).parents[1]}/=",  # the last one goes first
            *(f"-isystem{path}" for path in (build.includes if with_cuda else ())),
        ],
        # The static CUDA runtime keeps its names to itself: torch has one of its own. libtorch.so has no symbol, but
        # brings libtorch_cuda.so where there is one, for the weak symbol in csrc/cuda/operators.cpp.
        extra_link_args=["-Wl,--exclude-libs,ALL,--no-as-needed", "-ltorch", "-lrt", "-ldl"] if with_cuda else [],
    )


commands = {"build": CleanBuild}
if WITH_EXTENSION:
    setup(ext_modules=[extension()], cmdclass={**commands, "build_ext": Build, "build_cuda": BuildCuda})
else:
    setup(cmdclass=commands)
