"""Recipes, backbones, losses and the training loop; only `cluster` knows Ray."""
