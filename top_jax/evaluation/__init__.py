"""Accuracy of a model, its cost, and what its blocks do with the tokens."""
