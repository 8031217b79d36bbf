"""What a script needs around a network: its command line, its ranks, its random numbers, its machine, and whole files.

May import nothing of nanomed: everything else stands on this floor.
"""
