"""A trained run that answers: from Python, from the command line."""
