"""What the user can mend becomes one line and exit code 1; mistakes of the program keep their traceback."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(Exception):
    """Something that whoever started the program can mend; the message says how."""


@contextlib.contextmanager
def setting_up() -> Iterator[None]:
    """While a program reads its arguments, files and models, what libraries complain about is the user's to mend."""
    try:
        yield
    except LookupError as error:  # whose message is the key alone
        raise UserError(f"{type(error).__name__}: {error}") from error
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def one_line(program: str) -> Iterator[None]:
    """Turn a `UserError` into a line on standard error and exit code 1."""
    try:
        yield
    except UserError as error:
        # A data loader's worker puts its traceback in front of the message.
        message = " ".join(line.strip() for line in str(error).rpartition("UserError: ")[2].splitlines())
        sys.exit(f"{program}: {message}")
