"""The model files of a repository: `Model.code` names those that are copied into a model's `1/`.

The first becomes model.py; the others keep their names and are imported by it.
"""
