"""What all methods share: hyper-parameters and the names of parameters."""
