"""The pages say what is so: links and anchors lead somewhere, files and functions that are named are there, examples
run, commands are understood."""

import ast
import inspect
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tcm_fused

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks/results").glob("*.md")),
]
page = pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
WRITTEN = ("build/", "out/", "dist/", "benchmarks/results/<device>.json")  # by commands; not in the repository


def prose(path: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```\n", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def blocks(path: Path, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [block for name, block in found if name == language]


def code(path: Path) -> list[str]:
    """The words between backquotes."""
    return re.findall(r"`([^`\n]+)`", prose(path))


# Links.


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path) -> list[str]:
    text = prose(path)
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
        target, _, anchor = link.partition("#")
        there = (path.parent / target).resolve() if target else path
        if "://" in link:
            continue
        if not there.exists() or (anchor and anchor not in anchors(there)):
            found.append(link)
    return found


@page
def test_links(path: Path) -> None:
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    wrong = '# A title\n[a](none.md) [b](#no-title) ![c](none.png) <img src="none.png">\n'
    right = "[d](#a-title) [e](page.md#a-title) [f](https://example.org/none)\n```\n[g](none.md)\n```\n"
    (tmp_path / "page.md").write_text(wrong + right)
    assert broken_links(tmp_path / "page.md") == ["none.md", "#no-title", "none.png", "none.png"]


# Files and functions.


@cache
def definitions(path: Path) -> set[str]:
    """Names that a file defines."""
    text = path.read_text()
    if path.suffix == ".py":
        nodes = ast.walk(ast.parse(text))
        return {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    types = re.findall(r"^\s*(?:class|struct|enum(?: class)?) (?:alignas\(\d+\) )?(\w+)", text, flags=re.MULTILINE)
    functions = re.findall(r"^[ ]{0,2}(?!return|else)[\w:<>,*&\[\] ()]*[\w>&*)] [*&]?(\w+)\(", text, flags=re.MULTILINE)
    kernels = re.findall(r"(\w+)\(const __grid_constant__", text)
    return {*types, *functions, *kernels}


def missing_paths(path: Path) -> list[str]:
    """Paths that are named and not there, and `file:name` where the file does not define the name."""
    found = []
    for named in code(path):
        match = re.fullmatch(r"([\w.\-]+/[\w./\-]*|[\w\-]+\.(?:md|py|toml|txt))(?::(\w+))?", named)
        if match is None or named.startswith(WRITTEN):
            continue
        if not (ROOT / named.split("/")[0]).exists() and not Path(match[1]).suffix:
            continue  # a name with a stroke, such as that of a logged value
        file, name = ROOT / match[1], match[2]
        beside = path.parent / match[1]
        if not (file.exists() or beside.exists()) or (name and name not in definitions(file)):
            found.append(named)
    return found


@page
def test_paths(path: Path) -> None:
    assert missing_paths(path) == []


def test_missing_paths_are_found(tmp_path: Path) -> None:
    wrong = ["tcm_fused/none.py", "tcm_fused/loss.py:none", "csrc/cpu/pair_loops.h:best_isa_", "docs/none/", "none.md"]
    right = [
        "tcm_fused/loss.py:TCMLoss",
        "csrc/cpu/pair_loops.h:best_isa",
        "csrc/cpu/pair_loops.h:PairLoops",
        "docs/",
        "tcm/opis",
    ]
    (tmp_path / "page.md").write_text(" ".join(f"`{named}`" for named in wrong + right))
    assert missing_paths(tmp_path / "page.md") == wrong


def test_map_of_the_code() -> None:
    """In the README's tree, the first word of a line is a path."""
    (tree,) = [block for block in blocks(ROOT / "README.md", "") if "reference.py" in block]
    words = [word.strip(",;") for line in tree.splitlines() for word in line.split(maxsplit=1)[:1]]
    assert [word for word in words if not (ROOT / word).exists()] == []


# Names.


def wrong_names(path: Path) -> list[str]:
    """`tcm_fused.a.b` that is not there; calls of public functions with keywords that they do not take."""
    found = []
    for text in code(path):
        if re.fullmatch(r"tcm_fused(\.\w+)+", text) and not is_there(text):
            found.append(text)
        found += [text for call in calls(text) if not takes(call)]
    return found


def is_there(dotted: str) -> bool:
    module, _, name = dotted.rpartition(".")
    try:
        return hasattr(import_module(module), name) or find_spec(dotted) is not None
    except ImportError:
        return False


def calls(text: str) -> list[ast.Call]:
    """Those of names that tcm_fused exports."""
    try:
        nodes = ast.walk(ast.parse(text))
    except SyntaxError:
        return []
    found = [node for node in nodes if isinstance(node, ast.Call)]
    return [call for call in found if isinstance(call.func, ast.Name) and call.func.id in tcm_fused.__all__]


def takes(call: ast.Call) -> bool:
    assert isinstance(call.func, ast.Name)
    parameters = dict(inspect.signature(getattr(tcm_fused, call.func.id)).parameters)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parameters |= inspect.signature(tcm_fused.TCMLoss).parameters
    return all(keyword.arg in parameters for keyword in call.keywords)


@page
def test_names(path: Path) -> None:
    assert wrong_names(path) == []


def test_wrong_names_are_found(tmp_path: Path) -> None:
    wrong = ["tcm_fused.none", "tcm_loss(embeddings, labels, margin=1)", "DistributedTCMLoss(rings=True)"]
    right = ["tcm_fused.TCMLoss", "tcm_fused.thresholds.plots", "TCMLoss(margin_plus=0.9)", "f(x", "none(margin=1)"]
    (tmp_path / "page.md").write_text(" ".join(f"`{text}`" for text in wrong + right))
    assert wrong_names(tmp_path / "page.md") == wrong


def test_nothing_is_installed_by_a_name_that_is_not_ours() -> None:
    """Nothing named tcm_fused is published, so whoever publishes it would be installed."""
    for path in PAGES:
        assert re.search(r"pip install\b[^\n]*['\" ]tcm[_-]fused", path.read_text()) is None, path


# Commands.


def commands(path: Path) -> list[list[str]]:
    """The words of each, from blocks without a language and from between backquotes."""
    lines = [line for block in blocks(path, "") for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(text, comments=True) for text in lines + code(path) if re.match(r"make |python -m ", text)]
    return [line for line in words if line]


@page
def test_commands_are_there(path: Path) -> None:
    targets = re.findall(r"^([\w.$()/]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = [target.replace("$(VENV)", ".venv") for target in targets]
    found = commands(path)
    assert [line for line in found if line[0] == "make" and line[1] not in targets] == []
    modules = {line[2] for line in found if line[0] == "python"}
    assert [module for module in modules if find_spec(module) is None] == []


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that the pages' commands read, in the folder that they run in."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 6
    x = rng.normal(size=(6, 8))[labels] + rng.normal(size=(120, 8))
    for name in ("held_out", "test", "base", "with_tcm", "queries", "gallery"):
        np.savez(f"{name}.npz", embeddings=x, labels=labels)
    tcm_fused.Threshold(0.3).save("threshold.json")
    tcm_fused.match_probability(x, labels).save("probability.json")
    np.save("test_emb.npy", x)
    np.save("test_labels.npy", labels)


THRESHOLD_COMMANDS = sorted(
    {tuple(line[3:]) for path in PAGES for line in commands(path) if line[:3] == ["python", "-m", "tcm_fused"]}
)


@pytest.mark.usefixtures("files")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arguments", [a for a in THRESHOLD_COMMANDS if len(a) > 1], ids=" ".join)
def test_commands_run(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tcm_fused", *arguments])
    runpy.run_module("tcm_fused", run_name="__main__")


# Examples.


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """The names that the examples take for granted."""
    torch.manual_seed(0)
    labels = torch.arange(48) % 6
    embeddings = (torch.randn(6, 8)[labels] + torch.randn(48, 8)).requires_grad_()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield {
        "base_loss": lambda embeddings, labels: embeddings.square().mean(),
        "embeddings": embeddings,
        "labels": labels,
        "queries": embeddings,
        "bank": embeddings.detach().flip(0),
        "bank_labels": labels.flip(0),
        "mine": embeddings[8:16],
        "my_labels": labels[8:16],
        "everyone": embeddings,
        "all_labels": labels,
        "start": 8,
        "camera": labels % 2,
        "held_out": embeddings,
        "held_out_labels": labels,
        "trainer": SimpleNamespace(add_callback=lambda callback: None),
        "tmp_path": tmp_path,
    }
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=lambda path: path.name)
def test_examples_run(path: Path, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a page one after the other, as somebody would who reads it from the top."""
    monkeypatch.chdir(tmp_path)
    examples = blocks(path, "python")
    if any("sentence_transformers" in example for example in examples):
        from support.tiny_bert import encoder

        names["model"] = encoder(tmp_path / "bert")
    so_far: dict[str, Any] = {}
    for example in examples:
        so_far |= names
        exec(compile(example, f"{path.name}: {example[:60]}", "exec"), so_far)
