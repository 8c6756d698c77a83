"""The public names: there whatever is installed beside torch, each with one meaning; and the packages that
people are told to install are in the registries."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import benchmarks
import tcm_fused

ROOT = Path(__file__).parents[2]
OPTIONAL = ("matplotlib", "pandas", "pyarrow", "torchmetrics", "tqdm", "triton")

# Python without the libraries MISSING.
HIDE = """
import sys
class Hide:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide)
"""

# Everything that looks through a module's names, as tools do that know nothing of it.
LOOK_THROUGH = """
import copy, doctest, importlib, inspect, pickle, pkgutil, pydoc
import tcm_fused
packages = [tcm_fused]
for module in pkgutil.walk_packages(tcm_fused.__path__, "tcm_fused."):
    if module.ispkg:
        packages.append(importlib.import_module(module.name))
for package in packages:
    names = {}
    exec(f"from {package.__name__} import *", names)
    assert set(getattr(package, "__all__", ())) <= set(names), package
    assert set(getattr(package, "__all__", ())) <= set(dir(package)), package
    for name in dir(package):
        assert hasattr(package, name), (package, name)
    assert {name for name, _ in inspect.getmembers(package)} == set(dir(package)), package
    assert package.__name__ in pydoc.render_doc(package)
    doctest.DocTestFinder().find(package)
for name in tcm_fused.__all__:
    value = getattr(tcm_fused, name)
    assert pickle.loads(pickle.dumps(value)) is value or name == "__version__", name
    assert copy.copy(value) is value, name
    inspect.isclass(value) and inspect.signature(value)
assert "torchmetrics" in tcm_fused.OPIS.__doc__
assert not hasattr(tcm_fused, "OPS")
class Own(tcm_fused.OPIS):
    def __init__(self):
        super().__init__()
        self.own = 1
"""
# Each use of a library that is not there is an error that names it, by the name that pip knows.
WITHOUT_TORCHMETRICS = """
for make in (tcm_fused.OPIS, Own, lambda: tcm_fused.OPIS(far_range=(0.1, 0.2)), lambda: Own.__new__(Own)):
    try:
        make()
    except ImportError as error:
        assert "OPIS needs torchmetrics" in str(error) and "pip install torchmetrics" in str(error), error
        assert WORD in str(error), error
    else:
        raise AssertionError("made without torchmetrics")
"""


def run(script: str, **environment: str) -> None:
    """In a process of its own, quietly and without a warning."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", [(), ("torchmetrics",), OPTIONAL], ids="+".join)
def test_names_without_libraries(missing: tuple[str, ...]) -> None:
    """`from tcm_fused import *`, `hasattr`, `dir`, `help`, pickle, doctest and inspect find every name."""
    script = f"MISSING = {missing!r}\n{HIDE}{LOOK_THROUGH}"
    if "torchmetrics" in missing:
        script += WITHOUT_TORCHMETRICS.replace("WORD", "\"No module named 'torchmetrics'\"")
    else:
        script += "\nassert Own().own == 1\n"
    run(script)


@pytest.mark.parametrize("kind", ["ImportError", "RuntimeError", "AttributeError"])
def test_names_beside_a_broken_torchmetrics(tmp_path: Path, kind: str) -> None:
    """One that is installed and does not load is as none, and says why it does not."""
    (tmp_path / "torchmetrics.py").write_text(f"raise {kind}('operator nms does not exist')")
    run(LOOK_THROUGH + WITHOUT_TORCHMETRICS.replace("WORD", "'nms does not exist'"), PYTHONPATH=str(tmp_path))


def test_a_broken_triton_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise AttributeError('old Triton')")
    script = """
from tcm_fused.backends import choice
reason = choice.why_unavailable("triton")
assert "old Triton" in reason and "pip install triton" in reason, reason
"""
    run(script, PYTHONPATH=str(tmp_path))


def test_import_is_quiet() -> None:
    run("import tcm_fused")


def packages(top: ModuleType) -> list[ModuleType]:
    inner = [module.name for module in pkgutil.walk_packages(top.__path__, f"{top.__name__}.") if module.ispkg]
    return [top, *map(importlib.import_module, inner)]


@pytest.mark.parametrize("package", packages(tcm_fused) + packages(benchmarks), ids=lambda package: package.__name__)
def test_no_name_hides_a_module(package: ModuleType) -> None:
    """Else `import package.name as m` gives what bears the name and not the module, or one before and one after."""
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert not modules & set(getattr(package, "__all__", ()))
    for name in modules & set(vars(package)):
        assert inspect.ismodule(vars(package)[name]), name


@pytest.mark.parametrize("name", tcm_fused.__all__)
def test_public_names_are_no_modules(name: str) -> None:
    value = getattr(tcm_fused, name)
    with pytest.raises(ModuleNotFoundError, match=f"No module named 'tcm_fused.{name}'"):
        importlib.import_module(f"tcm_fused.{name}")
    assert getattr(tcm_fused, name) is value


def test_nobody_is_sent_to_a_package_that_is_not_ours() -> None:
    """tcm_fused is not published: a registry's package of that name, with extras or without, would be somebody's."""
    sent = re.compile(r"tcm[-_]fused\[|pip install [^`\n]*(?<![/\w.])tcm[-_]fused\b(?!/)")
    assert sent.search("pip install matplotlib, or 'tcm_fused[plots]'")
    assert sent.search("pip install --upgrade tcm-fused")
    assert not sent.search("pip install --no-build-isolation -e .")
    patterns = ("*.py", "*.md", "docs/*.md", "tcm_fused/**/*.py", "benchmarks/**/*.py", "csrc/**/*")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    found = {
        str(path): sent.findall(text) for path in files if path.is_file() and sent.search(text := path.read_text())
    }
    assert not found
