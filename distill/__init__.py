"""distill: from a teacher LLM to a small tool-using student in a verified Core ML package."""

__version__ = "0.1.0"
