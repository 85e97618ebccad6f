"""Forward-forward learning rules for asge-zoo, the norm that one of them needs, and the prediction that they share."""
