"""A scripted teacher: whole conversations over the built-in tools, right by construction."""
