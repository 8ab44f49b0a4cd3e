"""The tasks: one file and one word each."""
