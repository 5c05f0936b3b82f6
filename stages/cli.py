"""Turns a typed `main` into a command, and a StillroomError into one message and exit code 1."""

import os
import sys
from collections.abc import Callable

import typer

from storage.errors import StillroomError


def run(main: Callable[..., None], command: str | None = None) -> None:
    """Run `main` with the arguments of the command line; `command` is what its help calls it.

    Errors that a person can fix are printed without a traceback, unless --debug is given or STILLROOM_DEBUG
    is set. So is the name of a library that is not installed.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("STILLROOM_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog="--debug shows where an error comes from.")(main)
    try:
        app(prog_name=command)
    except StillroomError as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        if debug:
            raise
        sys.exit(missing_library(error))
    except KeyboardInterrupt:
        sys.exit(130)


def missing_library(error: ModuleNotFoundError) -> str:
    """The message for a library that is not installed."""
    return f"{error.name} is not installed: pip install 'stillroom[pipeline]'"
