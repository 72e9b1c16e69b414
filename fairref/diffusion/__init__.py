"""The diffusion process: schedule, solver, sampler, gradient (METHOD.md sections 1 and 2), in this reading order."""
