"""The maths: the noising process, guidance, samplers, and the way back through a sampler.

process.py is q(x_t | x_0) and what a network says about it; guidance.py closes over a denoiser; samplers.py calls the
closure; hldf.py differentiates through it. May import `weights` (for published schedules); must not know any network.
"""
