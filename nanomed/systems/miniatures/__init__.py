"""Miniatures of the systems: they need no weights and learn the toy world from nothing, on a CPU.

Each adds the stages, if there are any, that make what its paper finds published. A part of `systems`, and may import
what that may.
"""

from pathlib import Path

# What is drawn at the end of a training: in the checkout, from wherever the command is given.
_TEST = Path("weights/msdm-tiny/test.csv")
TEST_PROMPTS = str(_TEST if _TEST.is_file() else Path(__file__).resolve().parents[3] / _TEST)
