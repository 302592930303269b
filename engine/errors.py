"""The one exception a caller of the engine is meant to read."""


class InputError(ValueError):
    """What the caller gave cannot be done: the message names the field, the bound and the way out."""
