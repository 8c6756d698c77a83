"""The operators and what runs them."""
