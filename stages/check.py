"""params.yaml, checked -> results/limits.json: the limits that exports keep."""

from pipeline.config.load import load_params
from pipeline.runtime.files import write_json
from pipeline.runtime.progress import log
from stages import cli, paths


def main() -> None:
    """Check params.yaml."""
    params = load_params()
    write_json(params.export.model_dump(), paths.LIMITS)
    sections = {name: len(section) for name, section in params if isinstance(section, dict) and section}
    log("params.yaml: " + ", ".join(f"{count} {name}" for name, count in sections.items()))


if __name__ == "__main__":
    cli.run(main)
