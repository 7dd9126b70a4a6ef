"""Metrics with intervals, plots, the model card and the report."""
