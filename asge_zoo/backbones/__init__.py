"""Backbones: one file a family; importing it registers it."""
