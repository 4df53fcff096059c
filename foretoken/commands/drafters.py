"""`foretoken drafters`."""


def drafters() -> None:
    """List every drafter with its settings and their defaults."""
    from foretoken.catalogue import show

    show()
