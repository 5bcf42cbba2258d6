"""What a person reads of a step."""
