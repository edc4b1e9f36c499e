"""A health check that asks for one token: a server whose model died stays live and ready by its own word."""

from __future__ import annotations

import json

from triton_repo.deployment import Deployment

# Python rather than curl: the images of -trtllm-python-py3 are sure to have it.
_PROGRAM = """\
import http.client, json, sys
try:
    server = http.client.HTTPConnection("127.0.0.1", {port}, timeout={timeout_s})
    server.request("POST", {path!r}, {body!r}, {headers!r})
    response = server.getresponse()
    status, answer = response.status, json.loads(response.read())
except (OSError, ValueError, http.client.HTTPException) as error:
    sys.exit(f"{{type(error).__name__}}: {{error}}")
# Triton also answers errors with status 200.
if status != 200 or "error" in answer or "text_output" not in answer:
    sys.exit(f"HTTP {{status}}: {{answer}}")
"""


def request_body(deployment: Deployment) -> dict[str, object]:
    """One token of a short prompt, in the dialect of the flavour's text model."""
    name = "max_tokens" if deployment.flavour == "engine" else "sampling_param_max_tokens"
    return {"text_input": "a", name: 1}


def probe_command(deployment: Deployment, http_port: int, timeout_s: int) -> list[str]:
    """Exits with 0 when a token came within `timeout_s`, else with 1 and one line on stderr.

    Holds no dollar sign, which Compose and Kubernetes would read.
    """
    program = _PROGRAM.format(
        port=http_port,
        timeout_s=timeout_s,
        path=f"/v2/models/{deployment.text_model}/generate",
        body=json.dumps(request_body(deployment)),
        # A kept connection would delay the server's end.
        headers={"Content-Type": "application/json", "Connection": "close"},
    )
    return ["python3", "-c", program]
