"""Which files of the house import which: read from the source, lazy imports inside functions included."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("storage", "pipeline", "stages")


def modules() -> dict[str, Path]:
    """Every module of the house by its dotted name."""
    files = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return {_name(path): path for path in files}


def imported(path: Path) -> set[str]:
    """Dotted names that a file imports; `from a import b` gives a and a.b. TYPE_CHECKING does not count."""
    found: set[str] = set()
    for node in _running(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def closure(module: str) -> list[str]:
    """The files, relative to the root, that running a module can read: itself and all that it imports."""
    known, seen, waiting = modules(), set[str](), [module]
    while waiting:
        name = waiting.pop()
        if name in known and name not in seen:
            seen.add(name)
            waiting += [name.rpartition(".")[0], *imported(known[name])]
    return sorted(known[name].relative_to(ROOT).as_posix() for name in seen)


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _running(tree: ast.AST) -> list[ast.AST]:
    nodes: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += [node, *_running(node)]
    return nodes
