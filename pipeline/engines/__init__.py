"""Teachers at inference: rows in, cached targets out."""
