"""Learning of time grids (LD3): `learn.learn_time_grid` and what it is made of. The pairs to learn
from are in `pairs`, what is learned in `parameters`, the optimizers in `loop` and `official`.
"""
