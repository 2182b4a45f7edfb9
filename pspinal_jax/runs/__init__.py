"""Runs: a directory, a loop that fills it, and what is read out of it again."""
