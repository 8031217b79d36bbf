"""What not every device can do."""

import torch

NARROW = ("mps",)  # devices without float64


def wide(device: torch.device | str | None) -> torch.device | None:
    """Where float64 arithmetic for a device is done: there, or on the CPU for Apple's MPS, which has no such numbers.
    None, the default device, stays."""
    device = None if device is None else torch.device(device)
    return torch.device("cpu") if device is not None and device.type in NARROW else device
