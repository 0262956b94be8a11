"""Memory and speed: what a model needs of a chip, worked out or asked of the compiler, before a machine is rented."""
