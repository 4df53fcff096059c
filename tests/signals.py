"""Signals between tests and the commands that they run."""

import signal


def listening() -> None:
    """As `preexec_fn`: the command hears Ctrl-C also where the tests do not, as in a shell's background job."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
