"""What OpenAI's API has and this server does not offer: each is told in a sentence, with what to do instead.

None of it stands on the OpenAPI page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter

from api.strict_json import StrictRoute
from core.errors import InvalidInput, NotFound

#: How a fine-tuned model is talked to.
SERVING = (
    "Download the fine-tuned model (`shadowft jobs download JOB`, or the job's artifacts) and serve it, for example "
    "with: vllm serve DIR"
)
_EVALUATION = "GET /v1/fine_tuning/jobs/{id}/evaluation compares the models of a job."
_FILES = "Upload rows with the purpose `fine-tune` to POST /v1/files instead."

#: The start of a path below /v1 -> what it would do, and what to do instead.
_UNOFFERED = {
    "/chat/completions": ("Chat completions are", SERVING),
    "/completions": ("Completions are", SERVING),
    "/responses": ("Responses are", SERVING),
    "/conversations": ("Conversations are", SERVING),
    "/realtime": ("Realtime sessions are", SERVING),
    "/embeddings": ("Embeddings are", "Take them from an inference server of your own."),
    "/moderations": ("Moderations are", "Check texts before you upload them."),
    "/batches": ("Batches are", f"A training job reads its rows from a file; for inference: {SERVING}"),
    "/evals": ("Evals are", _EVALUATION),
    "/images": ("Images are", "This server fine-tunes language models."),
    "/audio": ("Audio is", "This server fine-tunes language models."),
    "/videos": ("Videos are", "This server fine-tunes language models."),
    "/assistants": ("Assistants are", SERVING),
    "/threads": ("Threads are", SERVING),
    "/vector_stores": ("Vector stores are", _FILES),
    "/containers": ("Containers are", _FILES),
    "/fine_tuning/alpha/graders": ("Graders are", f"They belong to reinforcement, which is not offered. {_EVALUATION}"),
    "/fine_tuning/checkpoints": (
        "Permissions on checkpoints are",
        "A team's keys see all of its checkpoints and no other team's.",
    ),
}

_METHODS: dict[str, str] = {
    "dpo": "train on the preferred answers alone, with the type 'supervised'.",
    "reinforcement": "collect answers that your grader likes, and train on them with the type 'supervised'.",
}

router = APIRouter(include_in_schema=False, route_class=StrictRoute)


def refuse_method(name: str) -> None:
    if name in _METHODS:
        raise InvalidInput(
            f"method.type '{name}' is not offered; {_METHODS[name]}", code="not_offered", param="method.type"
        )


def refuse_integrations(integrations: Sequence[Any] | None) -> None:
    if integrations:
        raise InvalidInput(
            "Integrations such as wandb are not offered: this server sends nothing elsewhere. The job's events and its "
            "result file hold every measurement.",
            code="not_offered",
            param="integrations",
        )


def _add(path: str, what: str, instead: str) -> None:
    async def refuse() -> None:
        raise NotFound(f"{what} not offered by this server.", code="not_offered", hint=instead)

    methods = ["GET", "POST", "PUT", "PATCH", "DELETE"]
    router.add_api_route(path, refuse, methods=methods)
    router.add_api_route(f"{path}/{{rest:path}}", refuse, methods=methods)


for _path, (_what, _instead) in _UNOFFERED.items():
    _add(_path, _what, _instead)
