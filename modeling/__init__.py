"""Backbones, heads, adapters and engines: what training and serving must do identically."""
