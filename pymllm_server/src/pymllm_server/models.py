"""GET /v1/models, /v1/models/{id} and /model_info: what is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends

from pymllm_server.state import ServerState, state_of

router = APIRouter()
State = Annotated[ServerState, Depends(state_of)]


def _model(state: ServerState) -> dict[str, Any]:
    return {
        "id": state.model_name,
        "object": "model",
        "created": state.created,
        "owned_by": "pymllm",
        "max_model_len": state.engine.plan.limits.context_length,
    }


@router.get("/v1/models", summary="List the served model")
async def models(state: State) -> dict[str, Any]:
    """One model: a server has one."""
    state.require_ready()
    return {"object": "list", "data": [_model(state)]}


@router.get("/v1/models/{model_id:path}", summary="Describe a model")
async def model(model_id: str, state: State) -> dict[str, Any]:
    """The served model, under its name or ``default``; names may hold slashes."""
    state.require_ready()
    state.require_model(model_id)
    return _model(state)


@router.get("/model_info", summary="Describe the checkpoint")
async def model_info(state: State) -> dict[str, Any]:
    """Where the model came from and what it is."""
    state.require_ready()
    server = state.settings.server
    plan = state.engine.plan
    return {
        "model_path": server.model_path,
        "tokenizer_path": server.tokenizer_path or server.model_path,
        "served_model_name": state.model_name,
        "model_type": _model_type(Path(plan.model_path)),
        "architectures": [plan.architecture],
    }


def _model_type(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None
