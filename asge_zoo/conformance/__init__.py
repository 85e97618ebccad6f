"""What components promise, by group, as checks that can be run on any of them (see `asge_zoo.testing`)."""
