"""Every test that takes `backend` runs on each. Hypothesis draws new inputs each time and prints how to repeat them.

Triton kernels run in its interpreter, on CPU tensors: that is decided here, since Triton reads the variable when the
kernels are imported. TRITON_INTERPRET=0 leaves it to the GPU; the tests of the interpreter are then skipped.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Their share of the cores, but never one thread alone, which would hide races; those that wait sleep.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(2, (os.cpu_count() or 2) // workers)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded, nor looked up
os.environ.setdefault("TCM_SEED", str(time.time_ns() % 2**32))  # processes that a test starts have it too

import numpy as np
import pytest
import torch
from support.parts import Pools
from support.ranks import Ranks

from tcm_fused.backends import choice

try:
    from hypothesis import settings
except ImportError:  # tests marked `cuda` do without
    pass
else:
    settings.register_profile("tcm_fused", deadline=None, derandomize=False, print_blob=True)
    settings.load_profile("tcm_fused")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="of each test one set of parameters a backend")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --quick: the first of each test's parameters, once for each `backend`, and nothing slow."""
    if not config.getoption("--quick"):
        return
    kept: dict[tuple[str, object], pytest.Item] = {}
    for item in items:
        parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        test = item.nodeid.partition("[")[0]
        if item.get_closest_marker("slow") is None:
            kept.setdefault((test, parameters.get("backend")), item)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept.values()])
    items[:] = kept.values()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes a minute or more; leave out with -m 'not slow'")
    config.addinivalue_line("markers", "cuda: runs kernels on a GPU; skipped, with the reason, where they cannot run")


@pytest.fixture(autouse=True)
def _gpu_or_skip(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("cuda") is not None and "gpu_backend" not in request.fixturenames:
        _skip_without("cuda")


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs on a GPU."""
    name: str = request.param
    _skip_without(name)
    return name


def _skip_without(name: str) -> None:
    reason = choice.why_unavailable(name)
    if reason is None and name == "triton" and os.environ["TRITON_INTERPRET"] == "1":
        reason = "Triton's kernels run in its interpreter; on a GPU set TRITON_INTERPRET=0"
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session", params=["cpu", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that runs on CPU tensors.

    The PyTorch form runs on one thread: its many small steps gain nothing from more, and on a machine that others use
    too they wait for each other, a hundred times longer than they work.
    """
    name: str = request.param
    threads = torch.get_num_threads()
    if name == "torch":
        torch.set_num_threads(1)
    yield name
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small work: where others use the machine too, two threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pools]:
    pools = Pools(tmp_path_factory.mktemp("ranks"))
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(params=[2, 3, 4])
def ranks(request: pytest.FixtureRequest, pools: Pools) -> Ranks:
    return pools[request.param]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh numbers for each test of each run; TCM_SEED in the environment draws those of a run again."""
    seed = int(os.environ["TCM_SEED"])
    print(f"TCM_SEED={seed}")  # pytest shows it where a test fails
    return np.random.default_rng([seed, *request.node.name.encode()])


@pytest.fixture
def poisoned() -> Iterator[None]:
    """PyTorch fills each tensor it allocates, workspace and results too: floats with NaN, integers with the largest."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 classes of 16 drawn images: 12 to train on, 12 to test."""
    from benchmarks.retrieval.drawn import draw_folder  # needs Pillow, which tests marked `cuda` do without

    folder = tmp_path_factory.mktemp("drawn") / "glyphs"
    draw_folder(folder, classes=24, images=16)
    return folder
