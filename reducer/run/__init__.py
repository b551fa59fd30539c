"""Carry a plan out, and keep what comes of it.

Knows run folders, what is left to do and what is known already. Draws no report, exports nothing, prints nothing.
"""
