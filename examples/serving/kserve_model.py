"""A bundle behind KServe's ModelServer (`pip install kserve .` in a copy of the erde repository).

    python kserve_model.py --model_name digits --bundle runs/a/bundle

It has KServe's own metrics, transformers and batcher. It has no limits, and no point that gives way to the load.
"""

import argparse
import asyncio

from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer, model_server
from kserve.errors import InvalidInput
from kserve.utils.utils import generate_uuid

from erde import UserError
from erde.runtime import Session


class EarlyExitModel(Model):
    """Answers pixels: UINT8 of shape (B, H, W, C)."""

    def __init__(self, name: str, bundle: str) -> None:
        super().__init__(name)
        self.session = Session(bundle, threads=1, spinning=False)
        self.ready = True

    async def predict(self, payload: InferRequest, headers=None, response_headers=None) -> InferResponse:
        """In a thread: on the event loop it would hold up the questions for health."""
        return await asyncio.to_thread(self.answer, payload)

    def answer(self, payload: InferRequest) -> InferResponse:
        """The outputs of ``erde serve``, by the same names."""
        point = (payload.parameters or {}).get("operating_point")
        try:
            images = payload.inputs[0].as_numpy().astype("uint8", copy=False)
            prediction = self.session.predict(images, operating_point=getattr(point, "string_param", point))
        except UserError as error:
            raise InvalidInput(str(error)) from error
        outputs = []
        for name, kind, values in (
            ("labels", "INT64", prediction.labels),
            ("probabilities", "FP32", prediction.probabilities.astype("float32")),
            ("exit", "INT64", prediction.exits),
            ("macs", "INT64", prediction.macs),
        ):
            output = InferOutput(name, list(values.shape), kind)
            output.set_data_from_numpy(values)
            outputs.append(output)
        return InferResponse(
            payload.id or generate_uuid(),
            self.name,
            outputs,
            parameters={"operating_point": prediction.operating_point},
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(parents=[model_server.parser])
    parser.add_argument("--bundle", required=True)
    arguments = parser.parse_args()
    ModelServer().start([EarlyExitModel(arguments.model_name, arguments.bundle)])
