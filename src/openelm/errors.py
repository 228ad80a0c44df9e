"""Errors that end a command with one line instead of a traceback."""

# The exit code of a run that was asked to stop and can go on (EX_TEMPFAIL of sysexits.h: try again later).
STOPPED = 75


class UserError(ValueError):
    """What a user can mend: the message gives the value, the rule and the remedy. Exit code 2."""


class Stopped(Exception):  # noqa: N818 (often no error at all)
    """A run that ended before its time and can be resumed, with the exit code that says why."""

    def __init__(self, message: str, code: int = STOPPED) -> None:
        super().__init__(message)
        self.code = code
