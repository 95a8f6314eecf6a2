"""The command ``lazyllm``."""
