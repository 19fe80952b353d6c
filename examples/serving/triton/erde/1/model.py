"""A bundle as a model of Triton's Python backend; config.pbtxt says where the bundle is.

Triton's Python needs erde: `pip install .` in its container, in a copy of the erde repository.
"""

import json

import triton_python_backend_utils as triton

from erde import UserError
from erde.runtime import Session


class TritonPythonModel:
    """Answers pixels with the inputs and outputs of ``erde serve``, by the same names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle, once in each instance."""
        config = json.loads(args["model_config"])
        self.session = Session(config["parameters"]["bundle"]["string_value"], threads=1, spinning=False)

    def execute(self, requests: list) -> list:
        """A response for each request; one that is wrong does not fail the others."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        """Labels, probabilities, exits and MACs, at the operating point that the request names."""
        images = triton.get_input_tensor_by_name(request, "images").as_numpy()
        parameters = json.loads(request.parameters() or "{}")
        try:
            prediction = self.session.predict(images, operating_point=parameters.get("operating_point"))
        except UserError as error:
            wrong = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(error=wrong)
        return triton.InferenceResponse(
            [
                triton.Tensor("labels", prediction.labels),
                triton.Tensor("probabilities", prediction.probabilities.astype("float32")),
                triton.Tensor("exit", prediction.exits),
                triton.Tensor("macs", prediction.macs),
            ]
        )
