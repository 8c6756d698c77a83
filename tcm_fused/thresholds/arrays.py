"""Arrays of .npy and .npz files. Nothing is unpickled, and no more is unpacked than a file of its size can hold."""

import math
import os
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from tcm_fused.thresholds.sets import Array

_MOST_PACKED = 200  # times: numbers that somebody measured do not shrink more
_BOMB = 1 << 30  # bytes from which on that matters


def read_npy(path: Path) -> Array:
    """The array of a file, as a map of it: nothing is read before it is used.

    Raises:
        ValueError, OSError: there is none, or it is damaged, pickled or shorter than it says.
    """
    with path.open("rb") as stream:
        if stream.read(len(npy.MAGIC_PREFIX)) == npy.MAGIC_PREFIX:
            stream.seek(0)
            size = _array_size(stream)
            _check_whole("it", size, path.stat().st_size - stream.tell())
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray):  # an .npz by another name
        raise ValueError("it is not a single array")
    return found if found.ndim else np.asarray(found)


def read_npz(path: Path, name: str) -> Array:
    """One array of an archive.

    Raises:
        ValueError, OSError: there is none, it is damaged or pickled, or would take more memory than there is.
    """
    path.stat()  # FileNotFoundError: is_zipfile only says no
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no .npz archive but damaged or pickled")
    with zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename.endswith(".npy")}
        if name not in members:
            raise ValueError(f"it has no array '{name}', only {', '.join(members) or 'none'}")
        _check_member(archive, members[name], path.stat().st_size)
    with np.load(path, allow_pickle=False) as arrays:
        return arrays[name]


def check_memory(size: float, packed: float) -> None:
    """ValueError if `size` bytes, which `packed` bytes of a file are to become, are out of all proportion."""
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > have:
        raise ValueError(
            f"it would take {size / 2**30:,.1f} GiB, and this machine has {have / 2**30:,.1f} GiB of memory"
        )
    if size > _BOMB and size > _MOST_PACKED * packed:
        raise ValueError(
            f"{packed:,.0f} bytes would become {size:,.0f}, {size / max(packed, 1):,.0f} times as many: no embeddings "
            "or labels can be packed so well; if they are meant to be so, save them with numpy.save"
        )


def _check_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, file_size: int) -> None:
    """By its own header and the archive's, before anything is unpacked."""
    with archive.open(member) as stream:
        size = _array_size(stream)
    _check_whole(f"its array {member.filename}", size, member.file_size)
    check_memory(max(size or 0, member.file_size), min(member.compress_size, file_size))


def _check_whole(name: str, size: int | None, there: int) -> None:
    if size is not None and size > there:
        raise ValueError(f"{name} is cut off: {there:,} of {size:,} bytes are there")


def _array_size(stream: IO[bytes]) -> int | None:
    """Bytes of the array whose header begins here; None for a kind of header that has no plain array."""
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        return None
    shape, _, dtype = readers[version](stream)
    if min(shape, default=0) < 0:
        raise ValueError(f"its header has the shape {shape}")
    if dtype.hasobject:  # of pickled objects the size is not known
        return None
    return math.prod(shape) * dtype.itemsize
