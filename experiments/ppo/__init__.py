"""PPO, to compare GRPO with: a critic says what to expect of a prompt, so that one sample a prompt is enough."""
