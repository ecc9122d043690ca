"""What a finished run is worth: figures with their uncertainty, a verdict in words, gates, pictures."""
