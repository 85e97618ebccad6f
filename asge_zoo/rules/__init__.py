"""Learning rules: one file each; importing it registers it."""
