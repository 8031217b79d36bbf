"""Miniatures of the systems: they need no weights and learn the toy world from nothing, on a CPU.

Each adds the stages, if there are any, that make what its paper finds published. A part of `systems`, and may import
what that may.
"""
