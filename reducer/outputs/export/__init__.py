"""Photos of a reduced list, written elsewhere: as they lie, a folder per label, or tar shards.

Copies bytes; decodes a photo only where it is to be made smaller.
"""
