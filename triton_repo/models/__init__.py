"""The model files of a repository, each copied there as `1/model.py`."""
