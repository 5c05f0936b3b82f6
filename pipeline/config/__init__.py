"""The schema of params.yaml, its cross-checks, and the table of tasks. Never imports torch."""
