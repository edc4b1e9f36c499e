"""The embedded engine's decoder on one H100 or H200, beside what the GPU's memory and matrix units allow."""
