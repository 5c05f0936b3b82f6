"""The command `stillroom`: the stages of dvc.yaml by name, and what people run by hand.

A module is imported when its command is named: `stillroom --help` imports no library, and a command that
needs no torch runs where torch is not installed.
"""

import ast
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

# In the order of the work: from params.yaml to the report.
STAGES = (
    "check", "fetch", "prepare", "augment", "teacher", "score", "cache", "verify", "mix", "receive", "task",
    "train", "train-tasks", "evaluate", "export", "report",
)  # fmt: skip
BY_HAND = ("run", "predict", "publish", "merge", "gc")
WITHOUT_NAME = ("check", "report")


def main() -> None:
    """The console script."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h"):
        print(usage())
        return
    if name not in (*STAGES, *BY_HAND):
        from pipeline.config.base import did_you_mean

        print(f"stillroom has no command {name!r}{did_you_mean(name, (*BY_HAND, *STAGES))}", file=sys.stderr)
        sys.exit(2)
    del sys.argv[1]
    from stages import cli

    try:
        command = importlib.import_module(module_of(name))
    except ModuleNotFoundError as error:
        sys.exit(cli.missing_library(error))
    cli.run(command.main, f"stillroom {name}")


def module_of(command: str) -> str:
    """The dotted name of the module whose `main` is this command."""
    package = "stages.commands" if command in BY_HAND else "stages"
    return f"{package}.{command.replace('-', '_')}"


def usage() -> str:
    """The help text: a line for each command, which is the first line of its module."""
    lines = ["Usage: stillroom COMMAND [ARGUMENTS]   stillroom COMMAND --help", ""]
    lines += ["Knowledge distillation from cached teachers.", "", "Commands:"]
    lines += [f"  {name:<18}{_summary(name)}" for name in BY_HAND]
    lines += [
        "",
        "Stages of dvc.yaml, as `stillroom run` and `dvc repro` run them; NAME is an entry of params.yaml:",
    ]
    lines += [f"  {name if name in WITHOUT_NAME else f'{name} NAME':<18}{_summary(name)}" for name in STAGES]
    return "\n".join(lines)


def _summary(command: str) -> str:
    spec = find_spec(module_of(command))
    assert spec is not None
    assert spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text())) or ""
    return text.splitlines()[0].rpartition("`: ")[2]


if __name__ == "__main__":
    main()
