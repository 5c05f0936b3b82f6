"""All results -> report/index.html, one page that needs no network."""

from pipeline.report.build import build_report
from pipeline.runtime.progress import log
from stages import cli, paths


def main() -> None:
    """Build the report."""
    paths.REPORT.parent.mkdir(parents=True, exist_ok=True)
    build_report(paths.EVAL, paths.CAPTURE, paths.MODELS, paths.EXPORT, paths.REPORT)
    log(f"report: {paths.REPORT.resolve()}")


if __name__ == "__main__":
    cli.run(main)
