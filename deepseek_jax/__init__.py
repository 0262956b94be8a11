"""DeepSeek-style language models in JAX, from a Hugging Face checkpoint to a GRPO-trained model.

The package is a row of rooms whose imports run one way: configuration, pure operations, modules, checkpoints,
text, generation, rewards, reinforcement learning, training. Import the room you need, for example
`deepseek_jax.rl.loss`; importing this package loads no array library and touches no device, file or network.
"""

__version__ = "0.1.0"
