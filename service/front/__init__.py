"""Several processes that speak HTTP in front of the one that runs the models, over Unix sockets.

In a front end: `front_end`, `link` (predictions as frames), `proxy` (everything else as HTTP). In the engine process:
`engine` (the whole), `supervisor` (keeps the front ends running), `exchange` (answers frames). Both: `frames`.
What a front end imports must stay light: no torch, no database, no framework (`tests/unit/service/test_front.py`).
"""
