"""The only room that imports Dask: connect to a cluster, check it, submit tasks, gather results.

Knows tasks and their results. Knows neither run folders nor what becomes of a result.
"""
