"""The operators, and the backends that run them."""
