"""What surrounds the training loop of train.py: batches and their caches, the optimizer, the judge, the dry run.

May import everything but scripts and `drawing`; must not know a system by name: it is told one.
"""
