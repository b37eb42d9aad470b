"""How a failure ends a command: one line on stderr and an exit status; a traceback only where the fault is this library's own. A warning is one line too."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import typer
from rich.text import Text
from typer.core import TyperGroup

from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.writing import CacheError
from titans_backends.cli import exit_codes
from titans_backends.cli.show import status_console
from titans_backends.errors import BackendError, BackendRefusedError, BoundCallMismatchError, RanksError, SwitchError, UnknownNameError

__all__ = ["CommandGroup", "MisuseError", "fail", "show_warning", "user_input"]

_MISUSED = (UnknownNameError, RanksError, SwitchError, SchemaError, CacheError, BackendError, BoundCallMismatchError)
_OURS = Path(__file__).resolve().parent.parent


class MisuseError(Exception):
    """What was typed cannot be done; the message says what would do."""


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Around what reads the user's words: a ValueError or TypeError there is the user's to mend, not a fault of ours."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise MisuseError(str(error)) from error


def fail(message: object, code: int) -> typer.Exit:
    """Prints `error: ...` on stderr; raise what comes back."""
    status_console().print(Text.assemble(("error: ", "bold red"), str(message)), soft_wrap=True)
    return typer.Exit(code)


def show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None, line: str | None = None
) -> None:
    """In place of `warnings.showwarning`: this library's own as `warning: ...`, without the line of code that told it; other packages' as Python has them."""
    if issubclass(category, UserWarning) and Path(filename).resolve().is_relative_to(_OURS):
        status_console().print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def _out_of_memory(error: Exception) -> bool:
    """On a CPU torch raises a plain RuntimeError."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


class CommandGroup(TyperGroup):
    """A group of commands whose known failures become a sentence and an exit status."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except BackendRefusedError as error:
            raise fail(error, exit_codes.FALLS_SHORT) from error
        except (MisuseError, *_MISUSED) as error:
            raise fail(error, exit_codes.MISUSED) from error
        except (MemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            told = " ".join(str(error).split()) or "the process may have no more"
            raise fail(f"this does not fit into the memory here; ask for less. {told[:300]}", exit_codes.FALLS_SHORT) from error
        except KeyboardInterrupt as error:
            sys.stderr.write("\ninterrupted\n")
            raise typer.Exit(exit_codes.INTERRUPTED) from error
