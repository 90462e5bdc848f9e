"""Mutated packages against distill.mil: `make fuzz`."""
