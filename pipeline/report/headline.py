"""The headline of a section: its finding in one or two sentences."""

from collections.abc import Sequence

from pipeline.report.views import Row, View, best_row, metric_mean, teacher_of


def headline(runs: Sequence[Row], teachers: Sequence[Row], shown: View) -> str:
    """The finding, computed from the numbers; it also states that distillation did not help."""
    scored = [row for row in runs if metric_mean(row, shown.metric) is not None]
    if not scored:
        return "No student has been evaluated yet."
    first = best_row(scored, shown)
    text = _quality(first, shown)
    teacher = teacher_of(first, teachers, shown)
    if teacher is not None:
        text += _against_teacher(first, teacher, shown)
    if first["distilled"]:
        gain = metric_mean(first, "over_labels")
        return text + (
            "." if gain is None else f". That is {_gain(gain, shown)} the same student on labels alone."
        )
    text += ". It learned from labels alone"
    distilled = [row for row in scored if row["distilled"]]
    if not distilled:
        return text + "."
    second = best_row(distilled, shown)
    behind = abs(metric_mean(first, shown.metric) - metric_mean(second, shown.metric))
    apart = f"{100 * behind:.1f} points" if shown.percent else f"{behind:.3g} in {shown.axis}"
    if shown.documents:
        apart = f"{behind:.1f} in {shown.axis}"
    return (
        f"{text}: distillation did not help here. "
        f"The best distilled run, {second['name']}, is {apart} behind."
    )


def _quality(row: Row, shown: View) -> str:
    on = f"{row['rows']:,} {row['split']} {'documents' if shown.documents else 'rows'}"
    return f"{row['name']} {shown.finding.format(metric_mean(row, shown.metric))} {on}"


def _against_teacher(row: Row, teacher: Row, shown: View) -> str:
    smaller = _times(metric_mean(teacher, "bytes") / metric_mean(row, "bytes"), "smaller", "larger")
    if not shown.documents:
        faster = metric_mean(teacher, "latency_ms_batch_1") / metric_mean(row, "latency_ms_batch_1")
        share = f" (its teacher: {metric_mean(teacher, shown.metric):.3f})"
        if shown.of_teacher:
            share = f", {metric_mean(row, 'of_teacher'):.1%} of the teacher's {shown.axis}"
        return f"{share}, in a file {smaller}, {_times(faster, 'faster', 'slower')}"
    faster = metric_mean(row, "tokens_per_second") / metric_mean(teacher, "tokens_per_second")
    share = f" (its teacher: {metric_mean(teacher, shown.metric):,.1f})"
    return f"{share}, in a file {smaller}, {_times(faster, 'faster', 'slower')} to read"


def _gain(value: float, shown: View) -> str:
    if shown.percent:
        return f"{value:+.1f} points over"
    unit = " nats a token" if shown.documents else ""
    return f"{abs(value):.3f}{unit} {'below' if value >= 0 else 'above'}"


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f} times {more}" if ratio >= 1 else f"{1 / ratio:.1f} times {less}"
