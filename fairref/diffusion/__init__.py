"""The diffusion process: read schedule, solver, model, sampler, gradient."""
