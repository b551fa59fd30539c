"""A collection as partitions: manifest, listings, shards, and how rows are divided.

Reads what lists photos; reads no photo. Knows no Dask.
"""
