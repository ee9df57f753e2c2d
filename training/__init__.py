"""Training of the cascade: packed volumes, simulated breathing, the training loop."""
