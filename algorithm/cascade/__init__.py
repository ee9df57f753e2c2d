"""The cascade of U-Nets, its weights, and the field around the lungs."""
