"""Images to latents and back: one file an autoencoder, with the names of its published checkpoint.

May import `layers` and `weights`; must not know denoisers or losses of diffusion.
"""
