"""What goes wrong with a model on disk."""


class ModelError(ValueError):
    """The model is missing or is not what it should be; the message says what to do."""
