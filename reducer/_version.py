"""The version of this package: one place for `reducer.__version__`, the wheel, and code that travels to workers.

Neither the package itself nor its metadata can tell: importing the package from within it would close a circle, and
code that was sent to a worker has no metadata there.
"""

__version__ = "0.1.0"
