"""`python -m tcm_fused info`: what this installation can do."""

import argparse
import json
import platform
from typing import Any

import torch

from tcm_fused import __version__, ops


def info() -> dict[str, Any]:
    """Version, torch, device, each backend with the reason where it is not available, and the build's facts."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    backends = {}
    for name in ops.BACKENDS:
        reason = ops.why_unavailable(name)
        backends[name] = {"available": reason is None, "reason": reason}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "device": device,
        "threads": torch.get_num_threads(),
        "backends": backends,
        "build": ops.build_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tcm_fused", description="Threshold-Consistent Margin loss, fused.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="version, device, available backends and build facts")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    facts = info()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for name in ("version", "torch", "device", "threads"):
        print(f"{name:20} {facts[name]}")
    for name, state in facts["backends"].items():
        print(f"{name:20} {'available' if state['available'] else 'not available: ' + state['reason']}")
    for name, value in (facts["build"] or {}).items():
        print(f"{name:20} {value}")


if __name__ == "__main__":
    main()
