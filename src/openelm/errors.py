"""The one exception that every floor of the house shares; it imports nothing."""


class UserError(ValueError):
    """Something that the user can mend: the message gives the value, the rule and the remedy.

    The command line prints it in one line and exits with 2.
    """
