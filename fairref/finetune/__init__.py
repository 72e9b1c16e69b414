"""Finetuning: the one room that knows both the sampler and fairness. Read recipes, setup, adapters, objective,
iteration, trainer."""
