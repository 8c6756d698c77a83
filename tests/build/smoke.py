"""Tries a wheel: `python tests/build/smoke.py WHEEL TORCH...` looks into it and installs it in a new environment with
each version of torch; `python smoke.py`, outside the clone, tries the tcm_fused that is installed there.

Of the versions of torch the first must be there to install; of another it is said if it is not.
"""

import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def check_installed() -> None:
    """Import, `info`, loss and gradient, OPIS: on the kernel as in plain PyTorch."""
    import torch

    import tcm_fused

    names: dict[str, object] = {}
    exec("from tcm_fused import *", names)
    assert set(tcm_fused.__all__) <= set(names)
    assert not Path(tcm_fused.__file__).parents[1].joinpath("csrc").exists(), "this is the clone"
    said = subprocess.run([sys.executable, "-m", "tcm_fused", "info", "--json"], stdout=subprocess.PIPE, check=True)
    facts = json.loads(said.stdout)
    assert facts["version"] == tcm_fused.__version__
    assert facts["backends"]["cpu"]["available"], facts["backends"]["cpu"]["reason"]

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 64, generator=generator), torch.arange(300) % 20
    x = x + 2 * torch.randn(20, 64, generator=generator)[y]
    bank, classes = x.flip(0).contiguous(), y.flip(0).contiguous()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        for reference in ((), (bank.to(dtype), classes)):
            results = []
            for backend in ("cpu", "torch"):
                leaf = x.detach().to(dtype).clone().requires_grad_()
                loss, stats = tcm_fused.tcm_loss(
                    leaf, y, *reference, margin_minus=0.1, backend=backend, return_stats=True
                )
                loss.backward()
                assert leaf.grad is not None
                assert stats.count_plus > 0
                assert stats.count_minus > 0
                results.append((loss.detach(), leaf.grad))
            for on_kernel, plain in zip(*results, strict=True):
                torch.testing.assert_close(on_kernel, plain, rtol=tolerance, atol=tolerance)
    scores = [tcm_fused.opis(x, y, backend=backend) for backend in ("cpu", "torch")]
    assert abs(scores[0].opis - scores[1].opis) <= 1e-9
    assert scores[0].recall_at_1 == scores[1].recall_at_1
    built = facts["build"]["cuda_architectures"] or f"none ({facts['build']['cuda_compiler']})"
    print(f"torch {torch.__version__}: {len(tcm_fused.__all__)} names, loss, gradient and OPIS; CUDA kernels: {built}")


def check_contents(wheel: Path) -> None:
    """Its name says for which Python and machine; the package alone is in it, with CUDA kernels; no path of here."""
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name.endswith(f"-{python}-{python}-linux_{platform.machine()}.whl"), wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        outside = [name for name in names if not re.match(r"tcm_fused(/|-[\d.]+\.dist-info/)", name)]
        assert not outside, outside
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        assert re.findall(r"^Requires-Dist: (torch\b.*)$", metadata, re.MULTILINE) == ["torch>=2.11"]
        for name in names:
            for folder in {str(ROOT), str(Path.home()), tempfile.gettempdir() + "/"}:
                assert folder.encode() not in archive.read(name), f"{name} names {folder}"
        [library] = [archive.read(name) for name in names if name.endswith(".so")]
    assert b"cudaLaunchKernel" in library or b"sm_80" in library, "no CUDA kernels"


def check_with(wheel: Path, torch: str) -> str | None:
    """`check_installed` in a new environment; None, or pip's last words if it cannot be set up."""
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder, "environment/bin/python"))
        subprocess.run([sys.executable, "-m", "venv", Path(folder, "environment")], check=True)
        command = [python, "-m", "pip", "install", "--quiet", "--no-compile", f"torch=={torch}", str(wheel.resolve())]
        pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if pip.returncode:
            return pip.stdout.strip().splitlines()[-1]
        shutil.copy(__file__, folder)
        subprocess.run([python, Path(folder, Path(__file__).name)], cwd=folder, check=True)
    return None


def main() -> None:
    if len(sys.argv) == 1:
        check_installed()
        return
    wheel, *versions = sys.argv[1:]
    check_contents(Path(wheel))
    print(f"{wheel}: {Path(wheel).stat().st_size / 1e6:.1f} MB")
    for torch in versions:
        reason = check_with(Path(wheel), torch)
        if reason is not None and torch == versions[0]:
            raise SystemExit(f"torch {torch}: {reason}")
        if reason is not None:
            print(f"torch {torch} cannot be had here, so the wheel was not tried with it: {reason}")


if __name__ == "__main__":
    main()
