"""Builds tcm_fused._C, the C++ extension. Everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "tcm_fused is built against the torch you run it with: install torch first, then "
        "`pip install --no-build-isolation .`"
    ) from error

ROOT = Path(__file__).parent
STABLE_ABI = "0x020b000000000000"  # operators use only what every torch from 2.11 on has


def compiler() -> str:
    """Name and version of the C++ compiler, for the build facts; an error says what to install if there is none."""
    command = os.environ.get("CXX", "g++")
    if shutil.which(command) is None:
        raise SystemExit(f"tcm_fused needs a C++20 compiler: '{command}' was not found; install g++ or set CXX")
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        raise SystemExit("tcm_fused needs Python's headers (Python.h): install python3-dev")
    return subprocess.run([command, "--version"], capture_output=True, text=True).stdout.splitlines()[0]


def extension() -> CppExtension:
    name = compiler()
    print(f"tcm_fused: CPU kernels with {name}, torch {torch.__version__} (stable ABI 2.11); no CUDA kernels yet")
    return CppExtension(
        "tcm_fused._C",
        sources=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.cpp"))],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.h"))],
        define_macros=[
            ("TORCH_STABLE_ONLY", None),
            ("TORCH_TARGET_VERSION", STABLE_ABI),
            ("TCM_COMPILER", f'"{name}"'),
            ("TCM_TORCH_VERSION", f'"{torch.__version__}"'),
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
        ],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
