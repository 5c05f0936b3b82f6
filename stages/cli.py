"""Turns a stage's typed `main` into a command, and a StillroomError into one message and exit code 1."""

import os
import sys
from collections.abc import Callable, Mapping

import typer

from storage.errors import StillroomError


def run(main: Callable[..., None] | Mapping[str, Callable[..., None]]) -> None:
    """Run `main` with the arguments of the command line; of several, the one that the first word names.

    Errors that a person can mend are printed without a traceback, unless --debug is given or STILLROOM_DEBUG
    is set.
    """
    debug = "--debug" in sys.argv or bool(os.environ.get("STILLROOM_DEBUG"))
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    if isinstance(main, Mapping):
        app.callback()(_only_commands)
    for name, command in main.items() if isinstance(main, Mapping) else [(None, main)]:
        app.command(name, epilog="--debug shows where an error comes from.")(command)
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
