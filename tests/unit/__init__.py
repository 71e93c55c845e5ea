"""One test module per source module."""
