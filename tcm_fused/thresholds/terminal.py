"""Commands on a terminal: text from files that cannot harm it, streams that take any text, and errors for people."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

_ERRORS = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, ArithmeticError)


def printable(text: object) -> str:
    r"""The text with control characters (such as escape sequences that colour, erase or retitle) written as `\x1b`.

    Example:
        >>> print(printable("cat\x1b[2J"))
        cat\x1b[2J
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def printable_lines(text: object) -> str:
    """`printable`, but for the line breaks."""
    return "\n".join(printable(line) for line in str(text).split("\n"))


class Parser(argparse.ArgumentParser):
    """A parser whose messages, which may quote names of files and their contents, cannot harm a terminal."""

    def exit(self, status: int = 0, message: str | None = None) -> Any:
        """End the process, with a message that is printable."""
        super().exit(status, None if message is None else printable_lines(message))


def take_any_text() -> None:
    """Characters that the terminal's encoding lacks are written as escapes, instead of ending a run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def run(parser: argparse.ArgumentParser, name: str, work: Callable[[], None], interrupted: str = "interrupted") -> None:
    """Do the work of a command; exit code 2 and a message on stderr for bad input, no traceback for a reader that left.

    Warnings are lines on stderr with the command's name, since there is no line of a program that they are about.

    Args:
        parser: ends the process.
        name: of the command, for messages.
        work: prints and writes.
        interrupted: said after SIGINT, with exit code 130.
    """
    take_any_text()
    as_before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{name}: warning: {printable_lines(message)}\n"
    try:
        work()
        sys.stdout.flush()
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"\n{interrupted}\n")
    except BrokenPipeError:  # who reads has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python still flushes it on leaving
        sys.exit(128 + signal.SIGPIPE)
    except _ERRORS as error:
        message = str(error) or type(error).__name__
        if "Original Traceback" in message:  # from a process that loads data: its last line is the error
            message = message.strip().splitlines()[-1]
        parser.exit(2, f"{name}: error: {message}\n")
    finally:
        warnings.formatwarning = as_before
