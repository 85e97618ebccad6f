"""Optimizers and learning-rate schedules; all are torch's own."""
