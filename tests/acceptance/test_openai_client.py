"""An outside client: the `openai` package asks for embeddings, and gets what the native route gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import openai
import pytest

from tests.acceptance.conftest import Service

TEXTS = ["a film that holds to the end", "It went on and on.", "Wheat and oil prices rose."]


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_embeddings_equal_the_native_ones_in_both_encodings(service: Service, client: openai.OpenAI) -> None:
    native = service.client.predict("minilm", TEXTS, return_embedding=True).json()["predictions"]
    expected = np.asarray([prediction["embedding"] for prediction in native], dtype=np.float32)
    assert expected.shape == (3, 384)
    assert np.linalg.norm(expected, axis=1) == pytest.approx(1.0, abs=1e-5)
    by_default = client.embeddings.create(model="minilm", input=TEXTS)  # the package asks for base64
    as_floats = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    for answer in (by_default, as_floats):
        assert [item.index for item in answer.data] == [0, 1, 2]
        assert np.asarray([item.embedding for item in answer.data]) == pytest.approx(expected, abs=1e-6)
        assert answer.model == "minilm"
        assert answer.usage.prompt_tokens > len(TEXTS)


def test_one_text_and_the_list_of_models(client: openai.OpenAI) -> None:
    assert len(client.embeddings.create(model="minilm", input=TEXTS[0]).data) == 1
    assert {"minilm", "tiny"} <= {model.id for model in client.models.list()}
    assert client.models.retrieve("minilm").owned_by == "backbone"


def test_refusals_arrive_as_the_errors_of_the_package(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="no-such-model") as missing:
        client.embeddings.create(model="no-such-model", input="text")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="Token ids"):
        client.embeddings.create(model="minilm", input=[1, 2, 3])
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="minilm", input=[])
