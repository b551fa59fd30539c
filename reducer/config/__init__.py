"""What a job does and where it runs, as people say it: checked before anything starts.

Knows the names and limits of every option. Opens no photo, starts no cluster, imports neither Dask nor Pillow.
"""
