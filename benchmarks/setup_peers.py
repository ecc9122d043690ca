"""Makes the environments in which the peers run."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from benchmarks.peers import FOLDER, PEERS


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, default=Path("data/peers"), help="folder for them; some 2 GB")
    parser.add_argument("--torch-index", help="index that torch alone is installed from, such as PyTorch's CPU builds")


def run(options: Namespace) -> None:
    for requirements in sorted({peer.requirements for peer in PEERS.values()}):
        folder = options.peers / requirements.removesuffix(".txt")
        print(f"installing into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
        pins = str(FOLDER / requirements)
        if options.torch_index is not None:
            subprocess.run([*pip, "--no-deps", "--index-url", options.torch_index, "-c", pins, "torch"], check=True)
        subprocess.run([*pip, "-r", pins], check=True)
