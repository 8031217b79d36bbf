"""What several networks share: blocks with the names of published checkpoints, and convolutions that are fast on CPUs.

May import nothing of nanomed.
"""
