"""What a person runs to understand the two gradient orders."""
