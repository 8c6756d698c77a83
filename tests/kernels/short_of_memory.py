"""Calls of the kernels in processes whose address space may grow by so much and no more; prints how each ended.

`python short_of_memory.py RUNS SEED` forks a process for each call from one that has torch loaded but has started no
thread and generated no code yet. One line for each: the exit status (negative: a signal), the call, and the error if
there was one.
"""

import os
import random
import resource
import sys
from typing import NamedTuple

import torch

import tcm_fused

PAGE = os.sysconf("SC_PAGE_SIZE")


class Case(NamedTuple):
    """A call, and the bytes that it may take."""

    call: str
    dtype: torch.dtype
    n: int
    d: int
    threads: int
    room: int


def draw(rng: random.Random) -> Case:
    # Where threads start, where code is generated, and where the large arrays are taken.
    room = rng.choice((rng.uniform(0, 1), rng.uniform(0, 8), rng.uniform(0, 60), rng.uniform(0, 300)))
    return Case(
        rng.choice(("loss", "tcm_loss", "squared", "counts", "counts of two sets")),
        rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float64)),
        rng.choice((64, 300, 1000, 3000)),
        rng.choice((16, 100, 256, 500)),
        rng.choice((1, 2, 4)),
        int(room * 2**20),
    )


def run(case: Case, x: torch.Tensor, y: torch.Tensor) -> None:
    operators, sides = torch.ops.tcm_fused, torch.tensor([0.9, 0.0], dtype=torch.float64)
    if case.call == "tcm_loss":
        tcm_fused.tcm_loss(x, y, margin_minus=0.0)
    elif case.call == "counts":
        operators.counts(x, y, None, None, len(y), torch.linspace(-1, 1, 40, dtype=x.dtype), 12, None)
    elif case.call == "counts of two sets":
        operators.counts(x, y, x, y, len(y), torch.linspace(-1, 1, 40, dtype=x.dtype), 12, None)
    else:
        operators.loss(x, y, None, None, None, sides, sides, case.call == "squared", False, True, False)


def child(case: Case) -> str:
    """The error, or nothing; the process goes on after either."""
    torch.set_num_threads(case.threads)
    dtype = torch.float32 if "counts" in case.call and case.dtype == torch.bfloat16 else case.dtype
    x = torch.randn(case.n, case.d, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.arange(case.n) // 10
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * PAGE
    no_limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + case.room, no_limit[1]))
    text = ""
    try:
        run(case, x, y)
    except (MemoryError, RuntimeError) as error:
        text = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, no_limit)
    run(case, x, y)
    return text


def main(runs: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(runs):
        case = draw(rng)
        read, write = os.pipe()
        process = os.fork()
        if process == 0:
            text = child(case)
            os.write(write, text.encode()[:4000])
            os._exit(0)
        os.close(write)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with open(read, errors="replace") as pipe:
            print(status, case, " ".join(pipe.read().split()), sep="\t", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
