"""What stops an export: each message says what to do."""


class ExportError(Exception):
    """The checkpoint, its tokenizer or its label map cannot become a model folder."""
