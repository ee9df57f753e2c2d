"""Training of the cascade: packed volumes, simulated breathing, the training loop."""

import algorithm  # noqa: F401 - before torch, see algorithm.cpus
