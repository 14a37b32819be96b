"""The one error that is shown to a person without a traceback."""


class UserError(ValueError):
    """Something that the user can put right: its text names the key or path, the value and the remedy."""
