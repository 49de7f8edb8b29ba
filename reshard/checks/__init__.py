"""Checks from headers and arithmetic alone, for CI: each gives findings; none reads a tensor."""
