"""What ftdist says to its user when something is wrong, and with which exit status it ends."""

OK = 0
FAILED = 1  # our own fault, or a crash in a rank
USAGE = 2  # the user's mistake: nothing was started
STOPPED = 75  # asked to stop: saved, and can be resumed (EX_TEMPFAIL: "try again")
FENCED = 93  # not to be started again by itself: somebody else has the run, or it makes no progress
INTERRUPTED = 130  # Ctrl-C


class Failed(Exception):
    """Something that ran broke: one line, and the exit status that goes with it."""

    def __init__(self, message: str, status: int = FAILED) -> None:
        super().__init__(message)
        self.status = status


class UserError(Exception):
    """A user's mistake. The message is one line: the key, the value, what is allowed, the fix."""
