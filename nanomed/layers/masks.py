"""Masks of padded texts: how much of a batch there is to compute."""

import numpy as np
import torch
from torch import Tensor


def longest(mask: Tensor) -> int:
    """Places up to the last one that any row of a mask (B, L) has; at least 1.

    A step of training must not wait for the device, so a mask on a GPU is not asked, nor one that is only a shape:
    then it is L, and the loader has cut the batch already (batches.py).
    """
    if type(mask) is not Tensor:
        return mask.shape[1]
    if mask.device.type != "cpu":
        if torch.is_grad_enabled() or mask.is_meta:
            return mask.shape[1]
        mask = mask.cpu()
    seen = np.flatnonzero(mask.bool().numpy().any(axis=0))
    return int(seen[-1]) + 1 if len(seen) else 1
