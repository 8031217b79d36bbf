"""Noisy latents, a timestep and conditions to a prediction."""
