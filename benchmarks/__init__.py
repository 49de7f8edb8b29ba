"""Whole-command measurements, as ratios within one run."""
