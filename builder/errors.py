"""The one error that is the user's to mend."""


class UserError(Exception):
    """What a user did wrong, or what the machine lacks, in one line.

    The message names the file or field, the value, and the remedy. The commands print it
    without a traceback and exit with 1.
    """
