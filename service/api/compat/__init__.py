"""Other services' protocols over the same core, with their own error shapes."""
