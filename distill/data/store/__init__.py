"""The teacher's next-token distributions: captured, coded, stored, read back."""
