"""The cache stage: plan the missing shards, answer them with the teacher, seal the cache; and verify."""
