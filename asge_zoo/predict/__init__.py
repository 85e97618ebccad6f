"""Prediction strategies: one file each; importing it registers it."""
