"""What a user sees: the real processes, through HTTP. A package, so that shared services end with its last test."""
