"""`sp-fast compress`: a trained full projector to a compact or quantised one, with the error that it made."""
