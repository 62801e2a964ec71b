"""The one exception for bad input: a message for a person, exit code 2, no traceback."""


class UserError(Exception):
    """Something the user can fix. The message names the field or file, the value and the fix.

    The command line prints the message alone and exits with code 2; in Python it is an ordinary exception.
    """


class Interrupted(Exception):
    """A signal asked the run to stop; everything up to `step` is saved and the same command resumes."""

    def __init__(self, signal_name: str, step: int):
        super().__init__(f"stopped by {signal_name} at step {step}, checkpoint saved")
        self.signal_name, self.step = signal_name, step

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as a shell reports it."""
        import signal

        return 128 + signal.Signals[self.signal_name]
