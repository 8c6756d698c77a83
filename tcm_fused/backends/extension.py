"""The C++ extension `tcm_fused._C`, whose import registers the kernels: where it is, or why there is none."""

import hashlib
import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import torch

NAME = "tcm_fused._C"
PACKAGE = Path(__file__).resolve().parents[1]
CLONE = PACKAGE.parent
SOURCES = CLONE / "csrc"
IN_CLONE = SOURCES.is_dir() and (CLONE / "setup.py").is_file()
# In a clone Python takes the package from the clone: only an editable install puts the extension there.
BUILD = f"pip install --no-build-isolation {'-e ' if IN_CLONE else ''}."


def load() -> tuple[Any, str | None]:
    """The extension and None, or None and the reason with the remedy.

    A clone without an extension of its own takes that of the tcm_fused which is installed elsewhere on the path, if it
    was built from the same sources. So `pip install .` is enough for work in the clone, until its C++ changes.
    """
    try:
        if NAME in sys.modules:
            return importlib.import_module(NAME), None
        spec = PathFinder.find_spec(NAME, [str(PACKAGE)]) or (_installed() if IN_CLONE else None)
        if spec is None or spec.origin is None or spec.loader is None:
            return None, _why_nowhere()
        if IN_CLONE and not _is_current(Path(spec.origin)):
            return None, _why_stale(Path(spec.origin))
        extension = module_from_spec(spec)
        spec.loader.exec_module(extension)
        sys.modules[NAME] = extension
        return extension, None
    except (ImportError, OSError) as error:
        return None, (
            f"the C++ extension ({NAME}) does not load: {error}. It needs torch 2.11 or later and the libraries it was "
            f"built with; this is torch {torch.__version__}. Build it anew for this environment: `{BUILD}`"
        )


def source_digest(folder: Path) -> str:
    """Of the C++ and CUDA sources in `folder`. setup.py takes it in the same way and builds it into the extension."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".h", ".cpp", ".cuh", ".cu"):
            state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()[:16]


def _installed() -> ModuleSpec | None:
    """The extension of a tcm_fused elsewhere on the path, which the clone hides."""
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != CLONE]
    package = PathFinder.find_spec("tcm_fused", elsewhere)
    return None if package is None else PathFinder.find_spec(NAME, package.submodule_search_locations)


def _is_current(library: Path) -> bool:
    """Whether it was built from the clone's sources. It is not loaded for that: its kernels would be registered."""
    return source_digest(SOURCES).encode() in library.read_bytes()


def _why_nowhere() -> str:
    others = sorted(path.name for path in PACKAGE.glob("_C.*") if path.suffix != ".pyi")
    if others:
        return (
            f"the C++ extension ({NAME}) was built for another Python ({', '.join(others)}; this is "
            f"{sys.implementation.cache_tag}): `{BUILD}` with this one"
        )
    if IN_CLONE:
        return (
            f"the C++ extension ({NAME}) is not built in the clone {CLONE}, from which Python takes tcm_fused here, or "
            f"was left out (TCM_FUSED_EXTENSION=0): `{BUILD}` there builds it"
        )
    return (
        f"tcm_fused was installed without its C++ extension ({NAME}; TCM_FUSED_EXTENSION=0): to have it, "
        f"`{BUILD}` in a clone, with a C++20 compiler and without that variable"
    )


def _why_stale(library: Path) -> str:
    if library.parent == PACKAGE:
        return (
            f"the C++ extension ({NAME}, {library}) was built from other sources than {SOURCES}; build it anew: "
            f"`{BUILD}` in {CLONE}"
        )
    return (
        f"Python takes tcm_fused from the clone {CLONE}, in which no C++ extension ({NAME}) is built, and the one "
        f"installed in {library.parent} was built from other sources: `{BUILD}` in the clone, run from another folder"
    )
