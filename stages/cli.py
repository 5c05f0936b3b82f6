"""Turns a stage's typed `main` into a command, and a StillroomError into one message and exit code 1."""

import os
import sys
from collections.abc import Callable

import typer

from storage.errors import StillroomError


def run(main: Callable[..., None], command: str | None = None) -> None:
    """Run `main` with the arguments of the command line; `command`: the word that has to come before them.

    Errors that a person can mend are printed without a traceback, unless --debug is given or STILLROOM_DEBUG
    is set.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("STILLROOM_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(command, epilog="--debug shows where an error comes from.")(main)
    if command:
        app.callback()(_only_commands)
    try:
        app()
    except StillroomError as error:
        if debug:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _only_commands() -> None:
    """Knowledge distillation from cached teachers."""
