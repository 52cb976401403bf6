"""What BAdam needs to train one block of layers at a time."""
