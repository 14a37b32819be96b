"""The one error that is shown to a person without a traceback."""


class UserError(ValueError):
    """Something that a person can put right: the text names the key, the value and the remedy."""
