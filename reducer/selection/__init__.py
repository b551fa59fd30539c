"""Arrays in, order out: distances, strategies, what a choice is worth, which rows are kept.

Pure functions: no file, no photo, no clock, no Dask, and no random state but keyed draws.
"""
