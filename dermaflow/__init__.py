"""DermaFlow: from an archive of dermoscopy images to a trained, calibrated, evaluated model.

Read the folders from top to bottom: datasets, preparation, learning, bundles, trust, evaluation, scoring, pathways.
"""

__version__ = "0.1.0"
