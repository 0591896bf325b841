"""What is refused, and in which words: tables of calls, for pytest."""

import re
from collections.abc import Callable, Mapping

import pytest


def refused(error: type[Exception], *words: str):
    """The error, and all of these words in its message."""
    pattern = "(?s)" + "".join(f"(?=.*{re.escape(word)})" for word in words)
    return pytest.raises(error, match=pattern)


def refusals(table: Mapping[str, tuple[Callable, type[Exception], *tuple[str, ...]]]):
    """Parametrises a test by `call, error, words`.

    Args:
        table: by the name of a case a call, the type of its error, and words of its
            message.
    """
    return pytest.mark.parametrize(
        "call, error, words",
        [
            pytest.param(call, error, words, id=name)
            for name, (call, error, *words) in table.items()
        ],
    )
