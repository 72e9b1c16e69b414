"""The one exception for a user's mistake."""


class UserError(ValueError):
    """One sentence: which file or option, what was found, what was expected, what to do."""
