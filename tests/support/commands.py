"""Commands of `python -m tcm_fused`, called in this process."""

from typing import Any

import pytest

from tcm_fused.__main__ import main


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The output of a command that succeeds."""
    main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def refuse(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The message of a command that fails with exit code 2, which is no traceback."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert left.value.code == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err
