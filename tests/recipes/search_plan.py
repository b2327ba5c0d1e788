"""A plan of the study of searches that is small enough for tests."""

SEARCH_PLAN = """
kind = "search"
alpha = 0.05
[digits]
recipe = "digits-resnet"
metric = "accuracy"
seeds = [11, 12]
pilot_seeds = [1]
arms = ["uniform", "erk", "domino", "magnitude", "taylor", "output", "refined"]
budgets.params = ["4:16"]
budgets.macs = ["4:16"]
[digits.config]
width = 16
blocks = 1
batch_size = 128
test_share = 0.6
validation_share = 0.4
[digits.dense]
epochs = 1
[digits.tune]
epochs = 1
lr = 0.01
lambda_w = 0.02
[digits.search]
calibration = 1
domino = {lr = 0.01, check_every = 1, pull_every = 1, pull = 10.0, max_steps = 200}
refine = {criterion = "magnitude", times = 2.0, domino = {pull = 20.0}}
"""
