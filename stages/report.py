"""All results -> report/index.html, one page that needs no network."""

from pipeline import report
from pipeline.progress import log
from stages import cli, paths


def main() -> None:
    """Build the report."""
    paths.REPORT.parent.mkdir(parents=True, exist_ok=True)
    report.build(paths.EVAL, paths.CAPTURE, paths.MODELS, paths.EXPORT, paths.REPORT)
    log(f"report: {paths.REPORT.resolve()}")


if __name__ == "__main__":
    cli.run(main)
