"""The contextual set: seeded scenarios of every kind, with gold calls, typed facts, fixtures and a right answer."""
