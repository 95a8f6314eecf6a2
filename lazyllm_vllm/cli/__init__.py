"""The ``lazyllm`` command."""
