"""From a Hugging Face checkpoint to a fused, sharded one."""
