"""Accuracy and cost of a model, and traces of its blocks' tokens."""
