"""The config and modeling files written beside a fused Hugging Face checkpoint."""
