"""A synthetic HAM10000: procedurally drawn caricatures of the seven lesion types, in the published layout."""

from dermaflow.datasets.synthetic.generate import SyntheticSummary, generate

__all__ = ["SyntheticSummary", "generate"]
