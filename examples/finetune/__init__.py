"""A fine-tune from a YAML file."""
