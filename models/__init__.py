"""Candidates: what they are, how they are loaded, checked and tuned."""
