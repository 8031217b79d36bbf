"""Prompts about images: paraphrases.

May import `data` (for the grammar of the organisers' prompts) and `run`; must not know systems.
"""
