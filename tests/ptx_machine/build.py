"""Builds the machine and the CUDA kernels for it, once for each content of the sources: in build/ptx_machine."""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
KEPT = ROOT / "build" / "ptx_machine"
ARCHITECTURES = {"80": "80", "90": "90a", "100": "100"}  # as the machine and as nvcc name them
UNITS = ("entry_loss", "entry_counts", "prologue")
CXX = (os.environ.get("CXX", "g++"), "-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-gnu-unique")
WARNINGS = ("-Wall", "-Wextra", "-Wno-restrict")  # g++ 12 sees one of those in the sum of two strings
NVCC = ("-std=c++20", "-O3", "-DTCM_FUSED_GUARD")


@cache
def nvcc() -> str:
    """nvcc, by CUDA_HOME or on the PATH. Tests are skipped without it, or fail where TCM_FUSED_CUDA is 1."""
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if found:
        return found
    reason = "the kernels' PTX is nvcc's, which is neither in CUDA_HOME nor on the PATH"
    if os.environ.get("TCM_FUSED_CUDA") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@contextmanager
def once(target: Path) -> Iterator[Path | None]:
    """A place to make `target` in, which it is moved from when it is there; None if there is a `target` already.

    Another process that wants the same waits until it is made.
    """
    if target.exists():
        yield None
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        new = target.with_name(f"new-{target.name}")
        yield new
        new.rename(target)


def digest(*parts: str | Path) -> str:
    """Of texts, and of the files of folders."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for path in sorted(p for p in part.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")):
                state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        else:
            state.update(part.encode() + b"\0")
    return state.hexdigest()[:16]


@cache
def machine_objects() -> tuple[Path, ...]:
    """The machine's own objects, without any kernel."""
    plan = run(nvcc(), "--dryrun", "-E", "-x", "cu", os.devnull)  # nvcc knows best where its own headers are
    include = sorted(set(re.findall(r'"(-I[^"]*)"', plan)))
    headers = digest(*(path.read_text() for path in sorted(HERE.glob("*.h"))), *CXX, *include)

    def compiled(source: Path) -> Path:
        target = KEPT / f"{source.stem}-{digest(headers, source.read_text())}.o"
        with once(target) as new:
            if new is not None:
                said = run(*CXX, *WARNINGS, *include, "-fPIC", "-c", source, "-o", new)
                assert "warning" not in said, said
        return target

    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(compiled, sorted(HERE.glob("*.cpp"))))


def library(objects: tuple[Path, ...] = ()) -> Path:
    """The machine as a shared library, with the host's part of kernels in it."""
    parts = (*machine_objects(), *objects)
    target = KEPT / f"machine-{digest(*map(str, parts))}.so"
    with once(target) as new:
        if new is not None:  # the runtime's functions are the machine's, also beside a torch that has CUDA
            run(CXX[0], "-shared", "-Wl,-Bsymbolic", "-o", new, *parts)
    return target


def ptx(unit: str, architecture: str, root: Path = ROOT) -> Path:
    """The PTX of one of UNITS for an architecture, from the sources below `root`."""
    target = KEPT / f"{unit}-{_content(unit, root)}.{architecture}.ptx"
    with once(target) as new:
        if new is not None:
            run(
                *_compiler(root), f"-arch=compute_{ARCHITECTURES[architecture]}", "-ptx", _source(unit, root), "-o", new
            )
    return target


def host_object(unit: str, root: Path = ROOT) -> Path:
    """The host's part of one of UNITS, which launches the kernels."""
    target = KEPT / f"{unit}-{_content(unit, root)}.o"
    with once(target) as new:
        if new is not None:
            flags = ("-arch=compute_80", "-code=compute_80", "--cudart=none", "-Xcompiler=-fPIC")
            run(*_compiler(root), *flags, "-c", _source(unit, root), "-o", new)
    return target


def _content(unit: str, root: Path) -> str:
    """Of all that a unit is made of."""
    contract = (root / "csrc/problem.h").read_text()
    entry = (HERE / f"{unit}.cu").read_text() if "entry" in unit else ""
    return digest(root / "csrc/cuda", contract, entry, nvcc(), *NVCC)


def _compiler(root: Path) -> tuple[str, ...]:
    return (nvcc(), *NVCC, f"-I{root / 'csrc/cuda'}")


def _source(unit: str, root: Path) -> Path:
    return (HERE if "entry" in unit else root / "csrc/cuda") / f"{unit}.cu"
