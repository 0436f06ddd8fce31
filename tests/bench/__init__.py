"""Measurements of the README: each compares medians of runs that alternate, so that a busy machine hits both alike."""
