"""A worked example: a small network learns to read handwritten digits.

Copy this package to start a project of your own. It is laid out as every torch_lab project is:
`preprocess` makes the data, `datasets`, `transforms`, `models` and `callbacks` hold the parts, and
each folder of `experiments` puts parts together in its `__main__.py` and sets their values in its
hparams scripts.
"""
