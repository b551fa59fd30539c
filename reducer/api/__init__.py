"""Each verb in Python, a file a verb.

Puts lower rooms together; holds no logic that another verb needs. Prints nothing.
"""
