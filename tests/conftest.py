"""For all tests."""

import signal

# Started in the background of a script, Python ignores SIGINT, and so does all that it starts: tests of Ctrl-C would hang.
signal.signal(signal.SIGINT, signal.default_int_handler)
