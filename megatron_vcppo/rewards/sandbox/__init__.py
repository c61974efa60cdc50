"""Where programs that a model wrote run: a process that holds no secret, sees little, and ends with its verdict."""
