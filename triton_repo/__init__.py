"""Engines on Triton Inference Server, and their latency against a baseline."""
