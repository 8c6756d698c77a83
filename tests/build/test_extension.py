"""Where the extension is looked for, and the message where there is none: a clone or an installation of each kind."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tcm_fused import _C
from tcm_fused.backends import extension

ROOT = Path(__file__).parents[2]
LIBRARY = Path(_C.__file__)

# In a process that takes tcm_fused from FOLDER: its reason to have no CPU kernel, the warnings of a loss, and whether
# a library by the extension's name is mapped.
ASK = """
import json, warnings
import torch, tcm_fused
from pathlib import Path
from tcm_fused.backends import choice
x, y = torch.eye(4), torch.arange(4) % 2
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    loss = tcm_fused.tcm_loss(x, y)
assert torch.equal(loss, torch.tensor(0.9)), loss
print(json.dumps({
    "package": str(Path(tcm_fused.__file__).parent),
    "reasons": [choice.why_unavailable(name) for name in ("cpu", "cuda")],
    "warnings": [str(one.message) for one in seen],
    "loaded": "/tcm_fused/_C" in Path("/proc/self/maps").read_text(),
    "facts": choice.build_info(),
}))
"""


def package(folder: Path, library: bool) -> Path:
    """tcm_fused copied into a folder, with the extension or without; the path where the extension is or would be."""
    ignored = shutil.ignore_patterns("__pycache__", *([] if library else ["*.so"]))
    shutil.copytree(ROOT / "tcm_fused", folder / "tcm_fused", ignore=ignored)
    return folder / "tcm_fused" / LIBRARY.name


def clone(folder: Path, library: bool = False) -> Path:
    path = package(folder, library)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copy(ROOT / "setup.py", folder)
    return path


def ask(folder: Path, *installed: Path) -> dict[str, Any]:
    """ASK in `folder`, with tcm_fused in the folders `installed` too, which come later on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, installed))}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["package"] == str((folder if (folder / "tcm_fused").exists() else installed[0]) / "tcm_fused")
    return found


def check_reason(found: dict[str, Any], *words: str, loaded: bool = False) -> None:
    """No kernel, the slow path with one warning, and in both the words."""
    reasons, warnings = found["reasons"], found["warnings"]
    assert isinstance(reasons, list)
    assert isinstance(warnings, list)
    assert len(warnings) == 1
    assert warnings[0].startswith("tcm_fused runs its slower PyTorch fallback on 'cpu': ")
    for text in (*reasons, *warnings):
        for word in ("C++ extension", "tcm_fused._C", "or use backend='torch'", *words):
            assert word in text, text
    assert found["facts"] is None
    assert found["loaded"] == loaded


def test_facts_have_the_digest_of_the_sources() -> None:
    assert _C.build_info()["sources"] == extension.source_digest(ROOT / "csrc")
    assert extension.load() == (_C, None)


def test_a_clone_takes_what_is_installed_from_the_same_sources(tmp_path: Path) -> None:
    """`pip install .`, then Python in the clone."""
    (tmp_path / "clone").mkdir()
    clone(tmp_path / "clone")
    package(tmp_path / "site", library=True)
    found = ask(tmp_path / "clone", tmp_path / "empty", tmp_path / "site")
    assert found["reasons"][0] is None
    assert found["warnings"] == []
    assert found["facts"] == _C.build_info()


def test_a_clone_refuses_what_is_installed_from_other_sources(tmp_path: Path) -> None:
    clone(tmp_path / "clone")
    package(tmp_path / "site", library=True)
    with (tmp_path / "clone/csrc/module.cpp").open("a") as file:
        file.write("// changed\n")
    found = ask(tmp_path / "clone", tmp_path / "site")
    words = (
        f"the clone {tmp_path}/clone",
        f"installed in {tmp_path}/site/tcm_fused",
        "other sources",
        "another folder",
    )
    check_reason(found, *words, "pip install --no-build-isolation -e .")


def test_a_clone_without_one(tmp_path: Path) -> None:
    clone(tmp_path)
    found = ask(tmp_path)
    check_reason(found, f"not built in the clone {tmp_path}", "pip install --no-build-isolation -e .", "EXTENSION=0")


def test_a_clone_whose_extension_is_stale(tmp_path: Path) -> None:
    """It is not loaded: its operators may take other arguments."""
    library = clone(tmp_path, library=True)
    (tmp_path / "csrc/module.cpp").write_text("// nothing\n")
    check_reason(ask(tmp_path), str(library), f"other sources than {tmp_path}/csrc", "-e .` in")


def test_digest(tmp_path: Path) -> None:
    """Every source counts, its name too, and nothing else."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    (csrc / "cuda/registers.md").write_text("other words\n")
    (csrc / ".module.cpp.swp").touch()
    digests = [extension.source_digest(ROOT / "csrc"), extension.source_digest(csrc)]
    assert digests[0] == digests[1]
    (csrc / "cpu/new.cpp").touch()
    digests.append(extension.source_digest(csrc))
    (csrc / "cpu/new.cpp").rename(csrc / "cpu/newer.cpp")
    digests.append(extension.source_digest(csrc))
    (csrc / "cpu/newer.cpp").unlink()
    (csrc / "module.cpp").unlink()
    digests.append(extension.source_digest(csrc))
    assert len(set(digests)) == 4


def test_an_extension_for_another_python(tmp_path: Path) -> None:
    """In a clone and where it is installed, both named."""
    other = LIBRARY.name.replace(str(sys.implementation.cache_tag), "cpython-399")
    assert other != LIBRARY.name
    for folder, make, command in (("clone", clone, "-e ."), ("site", package, "--no-build-isolation .")):
        library = make(tmp_path / folder, library=True)
        library.rename(library.with_name(other))
        found = ask(tmp_path / folder) if folder == "clone" else ask(tmp_path, tmp_path / folder)
        words = ("another Python", other, str(sys.implementation.cache_tag), command)
        check_reason(found, *words)


def test_smoke_script(tmp_path: Path) -> None:
    """That of `make wheel`, on a copy of the package with its extension."""
    package(tmp_path / "site", library=True)
    shutil.copy(ROOT / "tests/build/smoke.py", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "smoke.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "names, loss, gradient and OPIS; CUDA kernels: " in done.stdout


def test_installed_without(tmp_path: Path) -> None:
    package(tmp_path / "site", library=False)
    found = ask(tmp_path, tmp_path / "site")
    check_reason(found, "installed without its C++ extension", "TCM_FUSED_EXTENSION=0", "C++20 compiler")


@pytest.mark.parametrize(("damage", "word"), [("empty", "too short"), ("other symbols", "undefined symbol: torch_of_")])
def test_an_extension_that_does_not_load(tmp_path: Path, damage: str, word: str) -> None:
    """Damaged, or built for a torch with other symbols: the loader's own words, torch's version, and the remedy."""
    library = package(tmp_path / "site", library=True)
    if damage == "empty":
        library.write_bytes(b"")
    else:
        (tmp_path / "a.c").write_text("void torch_of_tomorrow(void); void PyInit__C(void) { torch_of_tomorrow(); }")
        compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
        subprocess.run([compiler, "-shared", "-fPIC", tmp_path / "a.c", "-o", library], check=True)
    found = ask(tmp_path, tmp_path / "site")
    check_reason(found, "does not load", word, "torch 2.11 or later", "this is torch ", "--no-build-isolation .`")


def test_an_unreadable_extension(tmp_path: Path) -> None:
    """A folder, say, in its place."""
    library = clone(tmp_path)
    library.mkdir()
    check_reason(ask(tmp_path), "-e .")
