"""The LLaMA model and the loss of its output layer."""
