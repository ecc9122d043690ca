"""The hot path: from a checked request to an answer. Knows no HTTP and, per request, no disk and no database."""
