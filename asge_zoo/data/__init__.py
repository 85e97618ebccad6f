"""Datasets and how they are read: one file a family; importing it registers it."""
