"""The model.py of a Triton model repository: Triton's Python backend loads it beside the engines and calls it.

It is copied there as it is. The backend's Python needs this project, a CUDA build of torch and the engines' library.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton's own

from exporters.tensorrt.runtime import EngineRuntime
from surgeon.cleanup import temporary_directory
from surgeon.errors import SurgeonError
from surgeon.generation import Sampling
from surgeon.inputs import Prompt
from surgeon.positions import Positions

MAX_TOKENS = 256


class RequestError(SurgeonError):
    """An input that the model does not take."""


class Cancelled(Exception):
    """The client does not want the rest of the answer."""


class TritonPythonModel:
    """Answers prompts about images one at a time, and sends the text as it is generated."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """`args` as Triton gives them: the model's folder and the version's name. Raises EngineError where the engines
        cannot run here, which Triton reports as the reason why the model does not load."""
        self.runtime = EngineRuntime(Path(args["model_repository"]) / args["model_version"] / "engines")

    def execute(self, requests: Sequence[Any]) -> None:
        """Decoupled: any number of responses a request, the last of them empty and final."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._answer(request, sender)
            except Cancelled:
                pass
            except SurgeonError as error:
                sender.send(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error))))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _answer(self, request: Any, sender: Any) -> None:
        def show(row: int, text: str) -> None:
            if sender.is_cancelled():
                raise Cancelled
            sender.send(_response(text))

        max_tokens = int(_one(request, "max_tokens", MAX_TOKENS))
        temperature = float(_one(request, "temperature", 0.0))
        if max_tokens < 1:
            raise RequestError(f"max_tokens is {max_tokens}; it starts at 1")
        if not 0 <= temperature < float("inf"):
            raise RequestError(f"temperature is {temperature}; it is 0 (greedy) or larger")
        with temporary_directory("surgeon-request-") as folder:
            images = []
            for number, content in enumerate(_all(request, "images")):
                images.append(folder / f"image-{number}")
                images[-1].write_bytes(content)
            prompt = Prompt(_text(_one(request, "prompt")), tuple(images))
            try:
                (generation,) = self.runtime.generate(
                    [prompt], max_tokens, Sampling(temperature), show, _positions(request)
                )
            except SurgeonError as error:
                raise RequestError(str(error).replace(f"{folder}/", "")) from error
        sender.send(_response("", generation.finish_reason))


def _response(text: str, finish_reason: str = "") -> Any:
    outputs = {"text": text, "finish_reason": finish_reason}
    return pb_utils.InferenceResponse(
        output_tensors=[
            pb_utils.Tensor(name, np.array([value.encode()], dtype=object)) for name, value in outputs.items()
        ]
    )


def _all(request: Any, name: str) -> list[Any]:
    """An input's values; none where it was left out."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return [] if tensor is None else list(tensor.as_numpy().reshape(-1))


def _one(request: Any, name: str, default: Any = None) -> Any:
    values = _all(request, name)
    if len(values) > 1 or (not values and default is None):
        raise RequestError(f"{name} has {len(values)} values, expected one")
    return values[0] if values else default


def _text(value: Any) -> str:
    try:
        return str(bytes(value).decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"the text is not UTF-8: {error}") from None


def _positions(request: Any) -> Positions | None:
    match _text(_one(request, "positions", b"")):
        case "":
            return None
        case "dhr":
            return "dhr"
        case "plain":
            return "plain"
        case other:
            raise RequestError(f"positions is {other!r}; there are dhr and plain")
