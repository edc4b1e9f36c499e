"""The models of a repository: those for text, and each flavour's own."""
