"""From stores and a method to a trained student."""
