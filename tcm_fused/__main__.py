"""`python -m tcm_fused`: facts about this installation (`info`), and the commands of `tcm_fused.thresholds`."""

import argparse
import json
import platform
from collections.abc import Sequence
from typing import Any

import torch

from tcm_fused import __version__
from tcm_fused.backends import choice
from tcm_fused.thresholds import command_line, deployment
from tcm_fused.thresholds.terminal import Parser, printable_lines, run


def info() -> dict[str, Any]:
    """Version, torch, device, each backend with the reason where it is not available, and the build's facts."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    backends = {}
    for name in choice.BACKENDS:
        reason = choice.why_unavailable(name)
        backends[name] = {"available": reason is None, "reason": reason}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "backends": backends,
        "build": choice.build_info(),
    }


def _info(arguments: argparse.Namespace) -> None:
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name in ("version", "torch", "device", "threads"):
        print(f"{name:20} {facts[name]}")
    for name, state in facts["backends"].items():
        print(f"{name:20} {_state(state)}")
    for name, value in (facts["build"] or {}).items():
        print(f"{name:20} {printable_lines(value)}")


def _state(state: dict[str, Any]) -> str:
    return "available" if state["available"] else f"not available: {printable_lines(state['reason'])}"


def _parser() -> Parser:
    parser = Parser(prog="python -m tcm_fused", description="Threshold-Consistent Margin loss, fused, and its measure.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="version, device, available backends and build facts")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.set_defaults(run=_info)
    command_line.add_commands(commands)
    deployment.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exit code 2 and a message on stderr for bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    run(parser, f"{parser.prog} {options.command}", lambda: options.run(options))


if __name__ == "__main__":
    main()
