"""Datasets: records, teacher distributions, toy sets, generation, validation."""
