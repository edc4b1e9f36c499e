"""Rewrites of a checkpoint: drop attention, fuse FFN runs, cut shards."""
