"""Want of memory is a Python exception, wherever it is met, and the process goes on."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("short_of_memory.py")


@pytest.mark.skipif(sys.platform != "linux", reason="address spaces are limited on Linux only")
@pytest.mark.parametrize("seed", [1, 2])
def test_short_of_memory(seed: int) -> None:
    """Threads that cannot be started ended the process, code that could not be generated was a segmentation fault."""
    command = [sys.executable, str(SCRIPT), "60", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(lines) == 60
    assert all(status == "0" for status, _, _ in lines), done.stdout + done.stderr
    errors = Counter(error for _, _, error in lines)
    assert 0 < errors.pop("") < 60, "limits are too narrow, or too wide"
    for error in errors:
        assert error.startswith("MemoryError: ") and ("MiB" in error or "tensor" in error or "threads" in error), error
    for purpose in ("threads", "the code of a matrix product", "a tensor"):
        assert any(purpose in error for error in errors), f"nobody met the want of memory for {purpose}"
