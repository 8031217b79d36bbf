"""Networks that predict noise, x_0 or v: one file a network, with the names of its published checkpoint.

May import `layers` and `weights`; must not know text encoders, samplers or losses.
"""
