"""The cascade of U-Nets, its weights, and the continuation of the field around the lungs."""
