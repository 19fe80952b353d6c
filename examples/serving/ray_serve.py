"""A bundle as a Ray Serve deployment that grows with the load.

It needs `pip install 'ray[serve]' .` in a copy of the erde repository.

    serve run ray_serve:app bundle=/absolute/path/to/bundle
    curl --data-binary @photo.png 'localhost:8000/?operating_point=risk-1'

Replicas may be on several machines: the bundle has to lie at the same path on each. Ray refuses what it cannot queue.
"""

import asyncio

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from erde import UserError
from erde.runtime import Session


@serve.deployment(
    ray_actor_options={"num_cpus": 1},
    # A replica answers one request at a time, on its one CPU: the next may wait in it.
    max_ongoing_requests=2,
    max_queued_requests=64,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 1},
)
class EarlyExit:
    """Answers an image file."""

    def __init__(self, bundle: str) -> None:
        # Made in the replica: a session cannot be sent from process to process.
        self.session = Session(bundle, threads=1, spinning=False)

    def answer(self, file: bytes, point: str | None) -> dict:
        """What ``Session.predict`` says of the image."""
        prediction = self.session.predict(file, operating_point=point)
        label = int(prediction.labels[0])
        return {
            "label": label,
            "class": prediction.names[0],
            "probability": float(prediction.probabilities[0, label]),
            "exit": int(prediction.exits[0]),
            "macs": int(prediction.macs[0]),
            "operating_point": prediction.operating_point,
        }

    async def __call__(self, request: Request) -> JSONResponse:
        """One image over HTTP."""
        file, point = await request.body(), request.query_params.get("operating_point")
        try:
            return JSONResponse(await asyncio.to_thread(self.answer, file, point))
        except UserError as error:
            return JSONResponse({"error": str(error)}, status_code=400)


def app(arguments: dict[str, str]) -> serve.Application:
    """The application that ``serve run`` starts."""
    return EarlyExit.bind(arguments["bundle"])
