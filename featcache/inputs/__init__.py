"""How a sample becomes what a model takes."""
