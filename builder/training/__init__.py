"""Training: the parent of the demo, and what makes a fused student as good as its parent."""
