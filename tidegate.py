"""Tidegate: judges what a language model says while it says it."""
