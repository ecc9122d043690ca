"""`/docs`: the API in a browser. Every file comes from here, so it works without a way to the internet.

The page needs no key, since a browser has none to send; the description that it shows does.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any, Final

from fastapi import APIRouter
from fastapi.responses import Response

from service.api.problems import Problem

router = APIRouter(include_in_schema=False)
_FOLDER: Final = files("service.api") / "docs_ui"
_MEDIA_TYPES: Final = {
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "swagger-ui.css": "text/css; charset=utf-8",
    "favicon-32x32.png": "image/png",
    "LICENSE": "text/plain; charset=utf-8",
}
_SAFE: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@router.get("/docs")
def page() -> Any:
    return Response((_FOLDER / "index.html").read_bytes(), media_type="text/html; charset=utf-8", headers=_SAFE)


@router.get("/docs/{name}")
def asset(name: str) -> Any:
    if name not in _MEDIA_TYPES:
        raise Problem(404, "not_found", "There is no such route.")
    headers = _SAFE | {"Cache-Control": "max-age=3600"}
    return Response((_FOLDER / name).read_bytes(), media_type=_MEDIA_TYPES[name], headers=headers)
