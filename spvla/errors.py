"""The one error type for bad input: what is wrong, which file or field, what would be right."""


class InputError(ValueError):
    """A user's input cannot be used. The message is one line; command lines print it and exit with code 2."""
