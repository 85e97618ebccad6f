"""Models on the Hub: what is published, and how it gets there and back."""
