"""`POST /predict` and its alias under a model's name, as the framework declares them."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from service.api import answers
from service.api.deps import JsonBody, Predicting, ServicesDep
from service.api.direct import Call
from service.api.measure import PREDICT, PREDICT_WITH
from service.api.schemas import PredictRequest, PredictResponse

router = APIRouter(tags=["inference"])


@router.post(PREDICT, response_model=PredictResponse, dependencies=[JsonBody], summary="Predict labels for texts")
async def predict(body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting) -> Response:
    return (await answers.predict(body, Call(services, principal, request.scope, request.receive))).response()


@router.post(
    PREDICT_WITH, response_model=PredictResponse, dependencies=[JsonBody], summary="Predict with the model in the path"
)
async def predict_with(
    model: str, body: PredictRequest, request: Request, services: ServicesDep, principal: Predicting
) -> Response:
    return (await answers.predict(body, Call(services, principal, request.scope, request.receive, model))).response()
