"""Metrics of trained students and teachers on the test split."""
