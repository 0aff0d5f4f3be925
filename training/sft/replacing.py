"""Attributes that an object has for a while only."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced(thing: object, name: str, value: object) -> Iterator[None]:
    """Within it, the object has another attribute; afterwards its own again, or the one of its class."""
    own = vars(thing).get(name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)
