"""Embeddings of a memory map of four times the memory that may be taken: in panels, and not copied."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

LIMIT = 80 << 20  # bytes beyond those of the process with torch loaded
ROWS, COLUMNS = LIMIT // 24_576, 24_576

# Data, in the words of setrlimit, is memory that is written to: not the pages of a file, which the system takes back.
SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from tcm_fused import evaluate
rng = np.random.default_rng(0)
small, y = rng.normal(size=(64, 24)).astype(np.float32), np.arange(64) % 8
evaluate(small, y, threshold=0.5)  # all is loaded
x, y = np.load(sys.argv[1], mmap_mode="r"), np.load(sys.argv[2])
status = Path("/proc/self/status").read_text()
data = 1024 * int(status.partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    np.ones_like(x)
except MemoryError:
    print("limited")
print(*evaluate(x, y, threshold=0.2).accepted, *evaluate(x, y, x[:100], y[:100], threshold=0.2).accepted)
status = Path("/proc/self/status").read_text()
print(1024 * int(status.partition("VmRSS:")[2].split()[0]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_four_times_the_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    y = np.arange(ROWS) % 50
    centres = rng.standard_normal((50, COLUMNS), dtype=np.float32)
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(ROWS, COLUMNS))
    for row in range(ROWS):
        x[row] = centres[y[row]] + rng.standard_normal(COLUMNS, dtype=np.float32) * rng.uniform(1, 3)
    x.flush()
    np.save(tmp_path / "y.npy", y)
    assert x.nbytes >= 0.99 * 4 * LIMIT
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    accepted, same = unit @ unit.T >= 0.2, y[:, None] == y
    pairs = [np.triu_indices(ROWS, 1), np.s_[:, :100]]
    expected = [(accepted & side)[part].sum() for part in pairs for side in (same, ~same)]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.npy"), str(tmp_path / "y.npy"), str(LIMIT)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # each thread has buffers of its own
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr
    limited, found, resident = done.stdout.splitlines()
    assert limited == "limited"
    assert np.abs(np.array(found.split(), dtype=int) - expected).max() <= 2  # pairs at the threshold, but for rounding
    assert int(resident) < 1 << 30
