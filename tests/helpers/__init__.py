"""What several tests need: the launcher of gloo ranks and tiny models."""
