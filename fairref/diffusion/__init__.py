"""The diffusion process: schedule, solver, sampler, gradient, in this reading order."""
