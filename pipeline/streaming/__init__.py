"""Cached shards to training batches, in an order that depends on (seed, epoch, position) alone."""
