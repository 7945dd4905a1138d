"""Learned time grids as users meet them: the command `learn-grid`, the comparison with hand-made
grids, plots, and the plans that the options of other commands ask for.
"""
