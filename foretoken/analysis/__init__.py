"""What an ordinary model knows about its future, and what guessing it is worth: pure functions, nothing printed."""
