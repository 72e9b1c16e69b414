"""Finetuning: the only room that knows both the sampler and fairness. Reading order: recipes, adapters, trainer."""
