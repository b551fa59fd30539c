"""Outputs that people take from a finished run.

Reads run folders, writes elsewhere or a page. Decides nothing that a run has decided.
"""
