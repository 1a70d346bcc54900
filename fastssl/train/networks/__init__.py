"""The methods' networks."""
