"""From the bytes of a photo to its hash, its vector or a small picture.

Reads files, objects and tar shards, and decodes. Knows nothing of labels, ranks, runs or Dask.
"""
