"""The subcommands of ``tilewright``."""
