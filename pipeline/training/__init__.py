"""Students trained from caches: runs, seeds, the loop, checkpoints. Never imports engines or teachers."""
