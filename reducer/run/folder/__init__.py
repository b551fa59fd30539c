"""The run folder, part by part: what a run writes, and all that is read of it later.

The client is its only writer, and each file is whole or absent. Knows no job, no plan and no Dask; decides nothing of
what it keeps.
"""

from reducer.run.folder.files import HASHES, IMAGES, OWN_FILES, REPORT, SUMMARY, VECTORS
from reducer.run.folder.folder import RunFolder

__all__ = ["HASHES", "IMAGES", "OWN_FILES", "REPORT", "SUMMARY", "VECTORS", "RunFolder"]
