"""Tools that a model may call while it answers: Python in a sandbox, text search, image search."""
