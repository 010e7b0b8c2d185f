"""What is done with the parts when an operation meets a split tensor. Importing this registers all rules."""

from tricorn.mp.tensor.rules import along, attention, elementwise, part, product, view, vocabulary

__all__ = ["along", "attention", "elementwise", "part", "product", "view", "vocabulary"]
