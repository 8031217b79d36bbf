"""Prompts to conditions: tokenizers (text -> ids and mask) and text encoders (ids and mask -> states).

tokenizer(prompts, length) -> ids int64 (B, L), mask bool (B, L), True where there is text
encoder(ids, mask) -> Tensor (B, L, D)

May import `weights` and `run`; must not know denoisers or systems.
"""
