"""What ftdist says to its user when something is wrong, and with which exit status it ends."""

OK = 0
FAILED = 1  # our own fault, or a crash in a rank
USAGE = 2  # the user's mistake: nothing was started
INTERRUPTED = 130  # Ctrl-C


class Failed(Exception):
    """Something that ran broke: one line, and the exit status that goes with it."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class UserError(Exception):
    """A user's mistake. The message is one line: the key, the value, what is allowed, the fix."""
