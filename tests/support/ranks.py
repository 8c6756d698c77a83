"""Processes that form a gloo group, started once and sent one piece of work after the other."""

import multiprocessing
import multiprocessing.connection
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

PATIENCE = 120.0  # seconds that a piece of work may take


class Outcome(NamedTuple):
    """The value that a rank returned, or the exception that it raised."""

    value: Any = None
    kind: str = ""
    message: str = ""
    trace: str = ""


class Ranks:
    """`world` processes, one a rank of the default group.

    They end by being killed: libraries keep threads of gloo until the interpreter is gone, and a thread that asks for
    it then aborts the process ("terminate called without an active exception").
    """

    def __init__(self, world: int, folder: Path, patience: float = PATIENCE) -> None:
        # From a process that has imported all but started no thread, as torch's do not survive a fork.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tcm_fused", "hypothesis", "pytest", "pytorch_metric_learning.losses"])
        self.world = world
        self.patience = patience
        self.connections: list[multiprocessing.connection.Connection] = []
        self.processes = []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, str(folder / f"ranks_{world}"), patience / 2, there)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Outcome]:
        """`function(rank, *arguments)` on every rank; a process that ends has the kind "dead"."""
        for connection in self.connections:
            connection.send((function, arguments))
        return [self._receive(rank) for rank in range(self.world)]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The value of each rank; none may raise."""
        outcomes = self.outcomes(function, *arguments)
        assert not any(outcome.kind for outcome in outcomes), "\n".join(o.trace or o.kind for o in outcomes if o.kind)
        return [outcome.value for outcome in outcomes]

    def close(self) -> None:
        """Ends the processes, without ceremony: that would take longer than the tests."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def _receive(self, rank: int) -> Outcome:
        assert self.connections[rank].poll(self.patience), f"rank {rank} hangs"
        try:
            outcome: Outcome = self.connections[rank].recv()
        except EOFError:
            return Outcome(kind="dead")
        return outcome


def _work(rank: int, world: int, file: str, seconds: float, connection: multiprocessing.connection.Connection) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=timeout)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        try:
            outcome = Outcome(function(rank, *arguments))
        except Exception as error:
            outcome = Outcome(kind=type(error).__name__, message=str(error), trace=traceback.format_exc())
        connection.send(outcome)
