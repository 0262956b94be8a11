"""Rows of every public form, where they come from, which are kept, and the order in which they are asked."""
