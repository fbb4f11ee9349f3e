"""The one error type for bad input: what is wrong, which file or field, what would be right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """A user's input cannot be used. Command lines print the message and exit with code 2.

    Args:
        message: one line: the file or field, what is wrong with it, what would be right.
        code: the kind of fault in lower case with hyphens, such as ``"scale-mismatch"``. It never changes, so that programs and
            tests can rely on it; the message may be reworded.
        field: the file, field or option at fault; None if the message names several.
    """

    def __init__(self, message: str, *, code: str = "invalid", field: str | None = None) -> None:
        super().__init__(message)
        self.code, self.field = code, field


@contextlib.contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """A package that cannot be imported inside is an :class:`InputError` that names the optional ``extra`` it comes with."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "spvla":
            raise
        message = f'{error.name} is not installed: pip install "spvla[{extra}]"'
        raise InputError(message, code="missing-extra", field=extra) from None
