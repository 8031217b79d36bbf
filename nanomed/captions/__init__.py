"""Prompts about images: paraphrases, and language models that write, with eyes or without.

    nanomed.captions.load(FOLDER)    a model with `logits` and `generate` (models.py; its networks are in networks/)

May import `text`, `layers`, `data` (for the grammar of the organisers' prompts), `weights` and `run`; must not know
systems.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":  # torch is imported only where a model is
        from nanomed.captions.models import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
