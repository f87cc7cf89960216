"""Accuracy and cost of a model."""
