"""Dense logits to sparse entries: top-k, random sampling, threshold sampling."""
