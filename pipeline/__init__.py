"""Everything that computes: data, teachers, capture, students, training, evaluation, the report.

Imports storage, never stages. File formats live in storage; numbers live in params.yaml.
"""
