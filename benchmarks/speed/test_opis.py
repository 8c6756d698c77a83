"""Time and peak memory of OPIS, fp32, in ratio to the symmetric similarity product alone and to blocked PyTorch.

Every test times `opis` in alternation with its peers, as test_speed.py does for the loss. Every figure is taken of
the whole result: rates of each class at 101 thresholds of a range that is not known before, and recall@1.
"""

from functools import partial
from typing import Any

import pytest

from benchmarks.speed.gate import check_opis
from benchmarks.speed.peers import make_classes, peak_extra_bytes, symmetric_product
from benchmarks.speed.test_speed import Steps, measure
from tcm_fused import opis

D = 512
BLOCKED_UP_TO = 8192  # the next size takes minutes


@pytest.fixture(scope="module", autouse=True)
def right_before_fast() -> None:
    """No figure of an OPIS that is wrong."""
    for backend in ("auto", "torch"):
        check_opis(partial(opis, backend=backend))


@pytest.mark.benchmark(group="opis")
@pytest.mark.parametrize("n", (8192, 60000))
def test_opis(benchmark: Any, n: int) -> None:
    """60,000 rows of 11,316 classes are Stanford Online Products' test set in size."""
    x, labels = make_classes(min(n, 512) if benchmark.disabled else n, D)
    steps: Steps = {"tcm_fused": partial(opis, x, labels), "product": partial(symmetric_product, x)}
    if n <= BLOCKED_UP_TO:
        steps["blocked PyTorch"] = partial(opis, x, labels, backend="torch")
    large = n > BLOCKED_UP_TO
    measure(benchmark, steps, runs=3 if large else 7, peers_every=1 if large else 2)
    small = make_classes(2048, D)
    benchmark.extra_info.update(n=n, d=D, classes=int(labels.max()) + 1, embedding_bytes=x.nbytes)
    benchmark.extra_info["peak_bytes"] = {
        "tcm_fused": peak_extra_bytes(steps["tcm_fused"], warm_up=partial(opis, *small))
    }
