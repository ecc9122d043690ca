"""Uploaded datasets: reading, checking, splitting and their records. Knows no torch, no HTTP and no model."""
