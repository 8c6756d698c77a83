"""Outputs: whole or not there at all, through links, into devices and FIFOs; and every check of them before any work.

No test touches a device of the machine: devices are made anew in a folder of the test.
"""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tcm_fused.__main__ import main
from tcm_fused.thresholds import outputs
from tcm_fused.thresholds.outputs import check_folder, check_outputs, write_whole


def put(content: str) -> Any:
    return lambda part: part.write_text(content)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o027)
    yield
    os.umask(old)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("set") / "both.npz"
    rng = np.random.default_rng(0)
    y = rng.integers(5, size=80)
    np.savez(path, embeddings=rng.standard_normal((5, 6))[y] + rng.standard_normal((80, 6)), labels=y)
    return path


def null_device(path: Path) -> Path:
    """A device that takes and forgets what is written, of the test's own."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with path.open("wb"):
            pass
    except OSError as error:
        pytest.skip(f"devices cannot be made here: {error.strerror}")
    return path


# Files.


def test_modes(tmp_path: Path, umask: None) -> None:
    """Those of a file that is there stay, a new one has that of the umask; nobody else reads what is half written."""
    for old in (0o600, 0o640, 0o755, 0o400, 0o060):
        path = tmp_path / f"{old}"
        path.write_text("old")
        path.chmod(old)
        seen: list[int] = []
        if os.access(path, os.W_OK):
            write_whole(path, lambda part, seen=seen: (seen.append(mode(part)), part.write_text("new")))  # type: ignore[misc]
            assert path.read_text() == "new" and mode(path) == old and seen == [0o600]
    write_whole(tmp_path / "fresh", put("new"))
    assert mode(tmp_path / "fresh") == 0o640


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_owners(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("old")
    os.chown(path, 1234, 2345)
    path.chmod(0o640)
    write_whole(path, put("new"))
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (1234, 2345, 0o640)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("relative", [True, False])
def test_links(tmp_path: Path, there: bool, relative: bool) -> None:
    """A chain of links into another folder: all stay, the file at its end is replaced."""
    (tmp_path / "far").mkdir()
    target = tmp_path / "far" / "target.json"
    if there:
        target.write_text("old")
        target.chmod(0o600)
    middle, link = tmp_path / "far" / "middle", tmp_path / "link.json"
    middle.symlink_to("target.json" if relative else target)
    link.symlink_to(Path("far/middle") if relative else middle)
    check_outputs([link])
    write_whole(link, put("new"))
    assert link.is_symlink() and middle.is_symlink() and not target.is_symlink()
    assert target.read_text() == "new"
    assert not there or mode(target) == 0o600
    assert sorted(p.name for p in (tmp_path / "far").iterdir()) == ["middle", "target.json"]


def test_a_second_name_of_a_file(tmp_path: Path) -> None:
    """A hard link stays one: both names have the new content."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old, and longer")
    os.link(first, second)
    write_whole(first, put("new"))
    assert first.read_text() == second.read_text() == "new"
    assert first.samefile(second)


def test_devices(tmp_path: Path, both: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device = null_device(tmp_path / "null")
    link = tmp_path / "link.svg"
    link.symlink_to(device)
    for path in (device, link):
        check_outputs([path, path])
        write_whole(path, put("new"))
    main(["opis", str(both), "--json", str(device), "--plot", str(link)])
    assert f"wrote {device}" in capsys.readouterr().out
    assert stat.S_ISCHR(device.stat().st_mode) and link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, device]


def test_fifos(tmp_path: Path) -> None:
    """Of a checkpoint too, which is written by going back and forth."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for save, content in ((put("new"), b"new"), (lambda part: torch.save({"a": torch.ones(9999)}, part), b"PK")):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda read=read: read.append(fifo.read_bytes()))
        reader.start()
        check_outputs([fifo])
        write_whole(fifo, save)
        reader.join()
        assert read[0].startswith(content)
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


# The source itself: it needs the standard library alone, and the package would load PyTorch each time.
WRITE = Path(outputs.__file__).read_text()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files as Linux has them")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output(tmp_path: Path, name: str) -> None:
    """A pipe and a file that the shell has opened: written on with, in order, and not begun anew."""
    path = Path(name)
    if name == "link":
        path = tmp_path / "link"
        path.symlink_to("/dev/stdout")
    script = f"""{WRITE}
path = Path({str(path)!r})
print("before", flush=True)
check_outputs([path])
write_whole(path, lambda part: part.write_text("new\\n"))
print("after")
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "before\nnew\nafter\n"
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", script], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "before\nnew\nafter\n"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names of open files as Linux has them")
def test_a_descriptor_that_is_open_for_reading(tmp_path: Path) -> None:
    """Such as /dev/stdin: said before the work."""
    (tmp_path / "file").write_text("old")
    with (tmp_path / "file").open() as stream, pytest.raises(ValueError, match=r"cannot write .*Permission denied"):
        check_outputs([Path(f"/proc/self/fd/{stream.fileno()}")])
    with (tmp_path / "file").open("r+") as stream:
        check_outputs([Path(f"/proc/self/fd/{stream.fileno()}")])


def test_process_substitution(tmp_path: Path, both: Path) -> None:
    command = f"{sys.executable} -m tcm_fused opis {both} --json >(cat > {tmp_path}/got.json)"
    subprocess.run(["bash", "-c", f"{command}; wait $!"], check=True, capture_output=True)
    for _ in range(50):
        if (tmp_path / "got.json").exists() and (tmp_path / "got.json").read_text().endswith("}\n"):
            return
        time.sleep(0.1)
    pytest.fail("nothing arrived")


@pytest.mark.parametrize("name", ["x" * 250, "é" * 125, "x" * 255, ".", "-"])
def test_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == ".":
        with pytest.raises(ValueError, match="it is a folder"):
            check_outputs([path])
        return
    for content in ("old", "new"):
        check_outputs([path])
        write_whole(path, put(content))
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of writing: the old file stays, nothing else does, and the process ends by the signal."""
    (tmp_path / "out").write_text("old")
    script = f"""{WRITE}
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
def save(part):
    part.write_text("ne")
    print("ready", flush=True)
    time.sleep(60)
write_whole(Path({str(tmp_path / "out")!r}), save)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    assert (tmp_path / "out").read_text() == "old"


def test_a_drawn_folder_leaves_nothing_of_itself(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.retrieval.drawn", str(tmp_path / "glyphs"), "--classes", "5000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob(".*/*/*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == -signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_handlers_of_others(tmp_path: Path) -> None:
    """One that somebody has set is used, and all are as before afterwards; other threads write as well."""
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:

        def save(part: Path) -> None:
            signal.raise_signal(signal.SIGTERM)
            part.write_text("new")

        write_whole(tmp_path / "out", save)
        assert came == [signal.SIGTERM] and (tmp_path / "out").read_text() == "new"
    finally:
        signal.signal(signal.SIGTERM, before)
    write_whole(tmp_path / "out", put("new"))
    assert signal.getsignal(signal.SIGTERM) == before and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    thread = threading.Thread(target=write_whole, args=(tmp_path / "thread", put("new")))
    thread.start()
    thread.join()
    assert (tmp_path / "thread").read_text() == "new"


def test_a_file_that_appears_meanwhile(tmp_path: Path) -> None:
    """Two that write one file: one of them wins, whole."""
    path = tmp_path / "out"

    def save(part: Path) -> None:
        write_whole(path, put("other"))
        part.write_text("mine")

    write_whole(path, save)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


# Checks before the work.


def test_outputs_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("none/there")
    (tmp_path / "into").symlink_to("folder")
    (tmp_path / "file").write_text("")
    (tmp_path / "input").write_text("")
    (tmp_path / "second").symlink_to("input")
    os.link(tmp_path / "input", tmp_path / "third")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # names of sockets are short
        server.bind("socket")
    for name, message in {
        "folder": "it is a folder",
        "into": "it is a folder",
        "none/out": "there is no folder",
        "nowhere": "there is no folder",
        "file/out": "Not a directory",
        "loop": "symbolic links",
        "socket": "it is a socket",
        "y" * 256: "File name too long",
        "input": "it is an input",
        "second": "it is an input",
        "third": "it is an input",
        "folder/../input": "it is an input",
    }.items():
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(ValueError, match="cannot write ") as refused:
            check_outputs([None, tmp_path / name], [None, tmp_path / "input"])
        assert message in str(refused.value) and name in str(refused.value)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "new-link").symlink_to("new")
    for twice in (("new", "new"), ("new", "folder/../new"), ("new", "new-link"), ("file", "file")):
        with pytest.raises(ValueError, match="it is an input or the other output"):
            check_outputs([tmp_path / name for name in twice])
    check_outputs([tmp_path / "new", tmp_path / "file"], [tmp_path / "input"])
    assert not (tmp_path / "new").exists()


def test_rights() -> None:
    """A folder or a file that may not be written to: said before the work, by the file's name."""
    with tempfile.TemporaryDirectory() as name:  # which others reach, unlike those that pytest makes
        folder = Path(name)
        (folder / "file").write_text("")
        (folder / "file").chmod(0o444)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:  # as a user who owns nothing, where we are root
            refused = 0
            try:
                if os.getuid() == 0:
                    os.setgroups([])
                    os.setgid(65534)
                    os.setuid(65534)
                for path in (folder / "new", folder / "file"):
                    try:
                        check_outputs([path])
                    except ValueError as error:
                        refused += str(error) == f"cannot write {path}: Permission denied"
            finally:
                os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        folder.chmod(0o755)


def test_folders(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "deeper")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(ValueError, match="cannot write into"):
            check_folder(folder)


@pytest.mark.parametrize(
    "command", [["opis"], ["calibrate", "--far", "0.1"], ["margins", "--far", ".1", "--frr", ".1"]]
)
@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_commands_look_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], option: str
) -> None:
    """Before even the input is read, which is not there."""
    with pytest.raises(SystemExit) as left:
        main([command[0], str(tmp_path / "none.npz"), *command[1:], option, str(tmp_path / "none" / "out.png")])
    assert left.value.code == 2
    assert "there is no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "none.npz"), option, str(tmp_path / "none" / "out.png")])
    assert "there is no folder" in capsys.readouterr().err
