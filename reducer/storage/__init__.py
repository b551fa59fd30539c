"""Where bytes lie, how files are written whole, and what tables look like.

Knows URLs and their options, stores, locks, Parquet and Arrow. Knows nothing of photos, labels that are ranked, runs or
Dask.
"""
