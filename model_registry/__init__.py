"""Versions, aliases and artefacts of models. Knows SQL and files; knows no torch and no HTTP."""
