"""QTIP: recognised, and refused by name."""
