"""Objectives, the optimizer, data and the resumable loop, with what a run shows and keeps of itself."""
