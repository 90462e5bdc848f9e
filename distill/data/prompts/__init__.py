"""What a teacher is asked: strata, files, tools, and what is left out as a duplicate or contaminated."""
