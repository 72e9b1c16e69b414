"""Finetuning: the one room that knows both the sampler and fairness. Read setup, terms, step, loop, run."""
