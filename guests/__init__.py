"""A guest: a small kernel in a real process."""
