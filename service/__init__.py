"""The HTTP service: routes, inference runtime and settings of the serving process."""
