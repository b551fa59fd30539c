"""One task, start to end, as a worker runs it: messages, the hash stage, the rank stage.

Knows photos and selection. Knows neither Dask nor the plan nor the run folder.
"""
