"""`python -m service`: the serving process."""

from __future__ import annotations

import json
import logging
import sys

from model_registry.logs import set_up
from model_registry.settings import refuse_to_start, retired_settings
from modeling.engines.onnx import refuse_both_wheels
from modeling.errors import EngineFailed
from service.api.guard import DrainState
from service.app import create_app
from service.metrics import ServingMetrics
from service.server import DrainTimes, serve
from service.settings import keep_threads_passive, load_settings
from service.wiring import build


def main() -> int:
    settings = load_settings()
    keep_threads_passive()
    set_up(settings.log_level)
    for warning in retired_settings():
        logging.getLogger("service").warning(warning, extra={"action": "retired_setting"})
    try:
        refuse_both_wheels()
    except EngineFailed as error:
        refuse_to_start(str(error))
    logging.getLogger("service").info(
        f"effective settings: {json.dumps(settings.public())}", extra={"action": "settings"}
    )
    drain = DrainState()
    metrics = ServingMetrics()
    times = DrainTimes(
        settings.drain_delay_s, settings.drain_grace_s, settings.drain_delay_s + settings.drain_grace_s + 15.0
    )
    app = create_app(settings, lambda: build(settings, drain, metrics), drain, metrics)
    serve(app, host=settings.host, port=settings.port, times=times)
    return 0


if __name__ == "__main__":
    sys.exit(main())
