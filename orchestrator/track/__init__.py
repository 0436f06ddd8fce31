"""The record of a run: results on disk, Weights & Biases, the report."""
