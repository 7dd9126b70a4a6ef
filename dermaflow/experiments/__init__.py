"""Sweeps: many recipes tried on held-out lesion folds, each run recorded, compared in pairs."""
