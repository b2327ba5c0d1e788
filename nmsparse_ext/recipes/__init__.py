"""Runnable recipes: whole jobs on real data, written to be read and copied."""
