"""Rewards: text to float, with TRL's signature, and their weighted sum."""
