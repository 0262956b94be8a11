"""Objectives, the optimizer, the train step and the resumable loop."""
