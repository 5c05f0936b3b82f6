"""All results -> report/index.html, a single file."""

from pipeline.config.load import load_params
from pipeline.report.build import build_report
from pipeline.runtime.progress import log
from stages import cli, paths


def main() -> None:
    """Build the report; of params.yaml without teachers and runs there is nothing to report."""
    params = load_params()
    paths.REPORT.parent.mkdir(parents=True, exist_ok=True)
    if not (params.teachers or params.everything_trained or any(paths.EVAL.glob("*.json"))):
        log("report: params.yaml has no teachers and no runs, so there is nothing to report")
        return
    build_report(paths.EVAL, paths.CAPTURE, paths.MODELS, paths.EXPORT, paths.REPORT)
    log(f"report: {paths.REPORT.resolve()}")


if __name__ == "__main__":
    cli.run(main)
