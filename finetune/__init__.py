"""Turns labelled data into task heads and adapters: datasets and jobs in front, training behind."""
