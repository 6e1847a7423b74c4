"""The error that is a message for the user."""


class ConfigError(ValueError):
    """A setting that cannot work: one sentence naming the value, what was expected, what to do.

    `run.py` prints it without a traceback; in a library call it is an ordinary ValueError.
    """
