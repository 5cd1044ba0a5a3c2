"""What networks on whole volumes share: the labels that they learn from."""
