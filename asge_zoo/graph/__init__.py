"""The network as a chain of units that learn alone, and what learns and predicts on it."""
