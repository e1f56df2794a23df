"""The prefix cache: what was computed for one text, kept for the next that begins like it."""
