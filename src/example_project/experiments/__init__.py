"""The experiments, numbered in the order in which they were thought of."""
