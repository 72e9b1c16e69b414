"""The diffusion process: schedule, solver, sampler, gradient, in this reading order; derivation beside them."""
