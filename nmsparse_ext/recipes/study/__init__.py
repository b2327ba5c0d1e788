"""The claims of the SR-STE paper, tested on small recipes with a plan that was fixed beforehand."""
