"""A trained student for other people's code."""
