"""What the command `deepseek-jax` does: a file a command, of which tools/ and experiments/ are launchers."""
