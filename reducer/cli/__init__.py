"""Each verb on the command line: options in, words and exit codes out.

Thin: parses, calls `reducer.api`, prints. Imports what a command needs when it is called.
"""
