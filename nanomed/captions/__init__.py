"""Prompts about images: paraphrases, and language models that write.

May import `text`, `data` (for the grammar of the organisers' prompts), `weights` and `run`; must not know systems.
"""
