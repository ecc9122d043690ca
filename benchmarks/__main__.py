"""`python -m benchmarks NAME`: full-size measurements. Figures go to `benchmarks/results/` and the terminal.

Afterwards `report` puts them into docs/benchmarks.md and `plots` draws them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import sys

# Compute threads of this process sleep between runs, as the service's do; before anything imports torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "setup": "make the peers' environments",
    "closed": "throughput and latency in a closed loop, against the peers",
    "open": "latency at constant rates, against the peers",
    "overload": "twice the capacity: goodput, and what the admitted waited",
    "replay": "texts per second over HTTP against the same batches straight through the engine",
    "models": "many heads and LoRA adapters against one, and their memory",
    "hot-load": "latency while versions are loaded and swapped",
    "cold-start": "from the start of the process to the first answer, with and without caches",
    "streams": "latency of requests beside thousands of idle event streams",
    "lengths": "cost against the length of a text",
    "parity": "answers of an engine against torch in fp32",
    "families": "every family of encoders on every engine, against transformers; the table of docs/encoders.md",
    "shapes": "texts per second of other families of MiniLM's size, on the engine chosen against torch in fp32",
    "http": "processor time of a request outside of the model",
    "training": "rows per second of a LoRA fine-tune, against transformers' Trainer",
    "memory": "peak memory of a LoRA run by the number of its rows",
    "probe-job": "a linear probe on R8 from request to first answer, against the bare embedding of its rows",
    "quality": "accuracy of fine-tuned models on public data",
    "mixed-tasks": "requests per second of pooled models beside a model of entities",
    "entities": "strict F1 of entities on names and templates that were held out, through REST",
    "methods": "accuracy, seconds and memory of every training method on R8",
    "few-shot": "setfit against the probe on a few rows of each class",
    "report": "put the results into docs/benchmarks.md",
    "plots": "draw the results into docs/images/",
}
_MODULES = {
    "setup": "setup_peers",
    "closed": "closed_loop",
    "open": "open_loop",
    "models": "many_models",
    "lengths": "length_cost",
    "http": "http_overhead",
    "streams": "event_streams",
}


def main() -> None:
    _allow_many_connections()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="NAME")
    asked = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == asked:  # the others' imports take seconds
            module = importlib.import_module(f"benchmarks.{_MODULES.get(name, name.replace('-', '_'))}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    options = parser.parse_args()
    options.run(options)


def _allow_many_connections() -> None:
    """A server that queues without bound leaves thousands of requests open under overload."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
