"""Which attention to drop, what to narrow and what to fuse, under a latency and memory target."""
