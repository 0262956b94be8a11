"""Group-relative policy optimisation: advantages, loss and rollouts, each a function of arrays."""
