"""Files of JSON that say what they hold: written whole or not at all, and read with care."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tcm_fused.thresholds.outputs import check_outputs, write_whole

_VERSION = 1
T = TypeVar("T")


class Kind(NamedTuple):
    """What such a file holds."""

    format: str  # in the file
    name: str  # in messages
    writers: str  # who writes them


def save(path: str | os.PathLike[str], kind: Kind, content: dict[str, Any]) -> None:
    """Write it as JSON: whole, or not at all.

    Raises:
        ValueError: it cannot be written there; the message says why.
    """
    target = Path(path)
    check_outputs([target])
    text = json.dumps({"format": kind.format, "version": _VERSION, **content}, indent=1, allow_nan=False) + "\n"
    write_whole(target, lambda part: part.write_text(text, encoding="utf-8"))


def load(path: str | os.PathLike[str], kind: Kind, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of the content of a file that `save` wrote.

    Raises:
        ValueError: there is no such file, or it holds something else; the message names it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_constant=_refuse)
    except OSError as error:
        raise ValueError(f"cannot read the {kind.name} {Path(path)}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no {kind.name}, since it is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != kind.format:
        raise ValueError(f"{path} is no {kind.name}: {kind.writers} write them")
    if type(content.get("version")) is not int or content["version"] != _VERSION:
        raise ValueError(f"{path} has version {content.get('version')!r}, this program reads {_VERSION}")
    try:
        return make(content)
    except KeyError as error:
        raise ValueError(f"{path} is damaged: it has no {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")
