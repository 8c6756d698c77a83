"""Outputs: files that are whole or not there at all, and checks, before any work, that they can be written."""

import errno
import fcntl
import os
import re
import secrets
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

PICTURES = (".png", ".pdf", ".svg")
_DESCRIPTOR = re.compile(r"/proc/(?:self|\d+)/fd/(\d+)")  # where /dev/stdout and >(...) of a shell lead on Linux


def write_whole(path: Path, save: Callable[[Path], Any]) -> None:
    """Let `save` write a file beside `path`, and give it that name when it is whole; nothing remains of a failure.

    A link stays, and the file that it leads to is replaced; mode and, as far as we may, owner stay too. Where
    there is no name of its own to give (a device, a FIFO, `/dev/stdout`, a file with a second name) the content is
    written into it. SIGTERM and SIGHUP end the process only after unfinished files have been removed.

    Raises:
        OSError: it cannot be written; and whatever `save` raises.
    """
    old = _status(path)
    if _is_replaced(path, old):
        _replace(Path(os.path.realpath(path)), old, save)
    else:
        _fill(path, save)


def _is_replaced(path: Path, old: os.stat_result | None) -> bool:
    """Whether a new file takes the name, rather than that something which is there is written into."""
    return old is None or (stat.S_ISREG(old.st_mode) and old.st_nlink == 1 and _descriptor(path) is None)


def _replace(target: Path, old: os.stat_result | None, save: Callable[[Path], Any]) -> None:
    part = target.with_name(part_name())
    with clearing(lambda: part.unlink(missing_ok=True)):
        # Nobody else reads it before it has the mode of the file that it replaces; a new one has that of the umask.
        os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666 if old is None else 0o600))
        save(part)
        if old is not None:
            _give(part, old)
        part.replace(target)


def _give(part: Path, old: os.stat_result) -> None:
    """Owner, as far as we may, and mode."""
    for owner, group in ((old.st_uid, -1), (-1, old.st_gid)):
        with suppress(PermissionError):
            os.chown(part, owner, group)
    part.chmod(stat.S_IMODE(old.st_mode))


def _fill(path: Path, save: Callable[[Path], Any]) -> None:
    """Write the content into the file that is there; it is made elsewhere first, since nobody can go back in a FIFO."""
    folder = tempfile.TemporaryDirectory()
    with clearing(folder.cleanup):
        part = Path(folder.name) / "whole"
        save(part)
        with part.open("rb") as content, _opened(path) as target:
            shutil.copyfileobj(content, target)


def _opened(path: Path) -> BinaryIO:
    """For writing; an open descriptor is written on with, from where it stands."""
    descriptor = _descriptor(path)
    return path.open("wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb")


def _descriptor(path: Path) -> int | None:
    """The open descriptor of this process that a path stands for, such as 1 for /dev/stdout."""
    name = os.path.abspath(path)
    for _ in range(40):  # as many links as Linux follows
        name = os.path.join(os.path.realpath(os.path.dirname(name)), os.path.basename(name))
        if found := _DESCRIPTOR.fullmatch(name):
            return int(found[1]) if name.startswith((f"/proc/{os.getpid()}/", "/proc/self/")) else None
        if not os.path.islink(name):
            return None
        name = os.path.join(os.path.dirname(name), os.readlink(name))
    return None


def part_name() -> str:
    """Short, since names of files may have 255 bytes only, and that of the file itself may take them all."""
    return f".{os.getpid()}-{secrets.token_hex(4)}.part"


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def check_outputs(outputs: Iterable[Path | None], inputs: Iterable[Path | None] = ()) -> None:
    """Before any work, so that none is lost: each can be written, and is no input nor given twice.

    Raises:
        ValueError: one is not; the message names it.
    """
    taken = [found for path in inputs if path is not None and (found := _identity(path)) is not None]
    for path in outputs:
        if path is None:
            continue
        try:
            _check_writable(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        mine = _identity(path)
        if mine in taken:
            raise ValueError(f"cannot write {path}: it is an input or the other output")
        if mine is not None:
            taken.append(mine)


def check_picture(path: Path | None) -> None:
    """ValueError unless its name says in which format it is to be drawn."""
    if path is not None and path.suffix.lower() not in PICTURES:
        raise ValueError(f"cannot draw {path}: its name must end in one of {', '.join(PICTURES)}")


def check_folder(folder: Path) -> None:
    """ValueError if files cannot be written into a folder, which is yet to be made, or not."""
    there = Path(os.path.realpath(folder))
    try:
        while _status(there) is None:
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"cannot write into {folder}: {there} is no folder")
        _try_folder(there)
    except OSError as error:
        raise ValueError(f"cannot write into {folder}: {error.strerror or error}") from error


def _identity(path: Path) -> Any:
    """The same for all names of one regular file; None for anything else, which may be given twice."""
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path)
    return (found.st_dev, found.st_ino) if stat.S_ISREG(found.st_mode) else None


def _check_writable(path: Path) -> None:
    old = _status(path)
    target = Path(os.path.realpath(path))
    if old is None and not target.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {target.parent}")
    if old is not None and stat.S_ISDIR(old.st_mode):
        raise ValueError(f"cannot write {path}: it is a folder")
    if old is not None and stat.S_ISSOCK(old.st_mode):
        raise ValueError(f"cannot write {path}: it is a socket")
    if old is not None and not _takes_content(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if _is_replaced(path, old):
        _try_folder(target.parent)


def _takes_content(path: Path) -> bool:
    """Whether it may be written to; of an open descriptor, such as that of /dev/stdin, as it was opened."""
    descriptor = _descriptor(path)
    if descriptor is None:
        return os.access(path, os.W_OK)
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def _try_folder(folder: Path) -> None:
    """By doing it: rights alone say nothing of a file system that is read-only."""
    part = folder / part_name()
    with clearing(lambda: part.unlink(missing_ok=True)):
        part.touch(exist_ok=False)


@contextmanager
def clearing(clear: Callable[[], None]) -> Iterator[None]:
    """`clear` after the block, however it ends: by SIGTERM or SIGHUP too, which end a process at once.

    Not for long work: a signal waits for the operation that runs. A handler that somebody has set is left alone.
    """

    def end(number: int, frame: FrameType | None) -> None:
        clear()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    numbers = []
    if threading.current_thread() is threading.main_thread():  # Python sets handlers there alone
        numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, end)
        yield
    finally:
        clear()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
