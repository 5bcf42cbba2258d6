"""The omni-modal experiment: its data, model, training and what it shows."""
