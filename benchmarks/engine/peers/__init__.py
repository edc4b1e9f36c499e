"""Engines that ours is compared with; each module runs in the peers' environment and imports it alone."""
