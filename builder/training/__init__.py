"""Training: the parent of the demo."""
