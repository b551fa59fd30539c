"""Configuration: the work and the place of a run, as people ask for it, checked before anything starts.

Knows the names and limits of every option. Opens no photo, starts no cluster, imports neither Dask nor Pillow.
"""
