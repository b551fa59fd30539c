"""Report of a run: its page, figures, galleries and small pictures.

Reads a run folder and draws; knows nothing of how photos were ranked.
"""
