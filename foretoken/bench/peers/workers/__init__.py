"""Scripts that run in a peer's environment, where foretoken is not installed: they import nothing of it."""
