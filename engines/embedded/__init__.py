"""The embedded engine: compiled ahead of time by AOTInductor, one process a rank."""
