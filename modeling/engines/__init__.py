"""Engines: the same backbone on different runtimes, behind one protocol."""
