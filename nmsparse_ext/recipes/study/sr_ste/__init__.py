"""The claims of the SR-STE paper, tested on small recipes."""
