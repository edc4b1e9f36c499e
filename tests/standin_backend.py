"""The embedded engine in the place of TensorRT-LLM's C++ backend, with what that one has more: drafts.

Copied as 1/model.py into a repository written for a GPU, whose config then says backend "python" and names
the engine in `standin_engine`. A target keeps of a draft what greedy decoding would have made, and adds one
token; it never answers the end token. `standin_spoil` makes a draft model err at every n-th token, and
`standin_log` has a line a pass, and one for each request that was stopped before its end. Requests with the
seed `SLOW` are slowed, so that there is time to stop them.
"""

import json
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils

from engines.embedded.session import Session
from triton_repo.models import embedded
from triton_repo.models.embedded import value


class TritonPythonModel(embedded.TritonPythonModel):
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.parameters = {k: v["string_value"] for k, v in config["parameters"].items()}
        self.spoil = int(self.parameters.get("standin_spoil", 0))
        super().initialize(args)

    def open_session(self, engine):
        return Session(Path(self.parameters["standin_engine"]))

    def start(self, request):
        with open(self.parameters["standin_log"], "a") as file:
            file.write(f"{self.parameters['standin_name']}\n")
        drafted = pb_utils.get_input_tensor_by_name(request, "draft_input_ids")
        outputs = super().start(request)
        if value(request, "seed") == SLOW:
            outputs = Slowed(outputs)
        if drafted is None and not self.spoil:
            return outputs
        tokens = [] if drafted is None else drafted.as_numpy()[0].tolist()
        return Kept(outputs, tokens, self.spoil)

    def run(self, running, request_id):
        super().run(running, request_id)
        if running.stopped:
            with open(self.parameters["standin_log"], "a") as file:
                file.write("stopped\n")


SLOW = 99


class Slowed:
    """The outputs, 20 ms apart."""

    def __init__(self, outputs):
        self.outputs = outputs

    def close(self):
        self.outputs.close()

    def __iter__(self):
        for output in self.outputs:
            time.sleep(0.02)
            yield output


class Kept:
    """The outputs up to the first that differs from the draft, that one included."""

    def __init__(self, outputs, drafted, spoil):
        self.outputs, self.drafted, self.spoil = outputs, drafted, spoil

    def close(self):
        self.outputs.close()

    def __iter__(self):
        count = 0
        for output in self.outputs:
            tokens = list(output.token_ids)
            if self.spoil and tokens and count % self.spoil == self.spoil - 1:
                tokens = [tokens[0] ^ 1]
            yield type(output)(token_ids=tuple(tokens), finish_reason=output.finish_reason)
            if tokens and self.drafted and count < len(self.drafted) and tokens[0] != self.drafted[count]:
                self.outputs.close()
                return
            count += len(tokens)
