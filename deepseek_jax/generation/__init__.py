"""From prompts to completions: one engine for rollouts, evaluation and the command line."""
