"""Studies: questions put to small recipes with a plan that is fixed before its tested runs are made.

The plan, a TOML file, says by `kind` which study it is: ``sr_ste`` tests the claims of the SR-STE paper, and
``search`` compares the ways to choose a pattern for every layer.
"""
