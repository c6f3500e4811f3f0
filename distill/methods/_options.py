"""What the numbers among a method's options have to be."""


def refuse_negative(**options: int | float) -> None:
    """Raises ValueError where one is below 0, or no number."""
    for name, value in options.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def refuse_not_positive(**options: int | float) -> None:
    """Raises ValueError where one is 0 or less, or no number."""
    for name, value in options.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value}")
