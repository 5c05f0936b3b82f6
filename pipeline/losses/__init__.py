"""Losses as pure functions of tensors: divergences, sparse targets, fused heads, features."""
