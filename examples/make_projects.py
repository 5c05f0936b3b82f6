"""Writes what is the same in all examples: dvc.yaml, from the root's, and the settings of DVC and git.

The graph of an example has the command `stillroom` in place of modules, and no dependency on code, as in any
project that uses an installed Stillroom. `make examples` runs this file.
"""

import re
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

HERE = Path(__file__).parent
CODE = re.compile(r"(pipeline|stages|storage)(/|$)")
HEADER = """\
# The graph over the entries of params.yaml. Paths are here, numbers in params.yaml. The same in every
# project; `make examples` writes it, from the graph of the repository's root.
"""
SETTINGS = """\
[core]
    analytics = false
    check_update = false
[cache]
    dir = ../../../.dvc/cache
    type = "reflink,hardlink,symlink,copy"
"""


def graph(root_graph: str) -> str:
    """The text of an example's dvc.yaml, from the text of the root's."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 110, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    named = re.sub(
        r"python -m stages\.(\w+)", lambda found: f"stillroom {found[1].replace('_', '-')}", root_graph
    )
    found = yaml.load(named[named.index("vars:") :])
    for stage in found["stages"].values():
        deps = stage.get("do", stage).get("deps", [])
        for place in reversed(range(len(deps))):
            if CODE.match(deps[place]):
                del deps[place]
    written = StringIO()
    yaml.dump(found, written)
    return HEADER + written.getvalue()


def files() -> dict[str, str]:
    """The text of every file that all examples share, by its path in an example."""
    root = HERE.parent
    ignored = (root / ".gitignore").read_text()
    made = ignored[ignored.index("# outputs of `dvc repro`") : ignored.index("\n# environments of")]
    return {
        "dvc.yaml": graph((root / "dvc.yaml").read_text()),
        ".dvc/config": SETTINGS,
        ".dvc/.gitignore": (root / ".dvc" / ".gitignore").read_text(),
        ".dvcignore": ".stillroom\n",
        ".gitignore": made,
    }


def main() -> None:
    """Write them into every directory that has a params.yaml."""
    for project in sorted(HERE.glob("*/params.yaml")):
        for name, text in files().items():
            path = project.parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)


if __name__ == "__main__":
    main()
