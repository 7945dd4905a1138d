"""From a data set to a one-forward sampler: teacher, trajectories, student."""
