"""What FastAPI cannot derive: the request body that is a spec or a question about one, as JSON or YAML."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel

from planner.specs.sections import SpecDocument

EXAMPLE_SPEC: Final[dict[str, Any]] = {
    "name": "gpt2-pretrain",
    "model": {"source": "transformers", "model_type": "gpt2", "task": "causal-lm"},
    "data": {"kind": "tokens", "sequence_length": 1024},
    "train": {"optimizer": "adamw"},
    "variants": {"precision": ["fp32", "bf16-amp"], "checkpointing": ["none", "full"]},
}


def question_body(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI ``requestBody`` of a route that reads ``model`` with ``read_question``."""
    question = model.model_json_schema()
    question["properties"]["spec"] = {"$ref": "#/components/schemas/SpecDocument"}
    schema = {"oneOf": [question, {"$ref": "#/components/schemas/SpecDocument"}]}
    examples = {
        "question": {
            "summary": "A spec and the question",
            "value": {"spec": EXAMPLE_SPEC, "gpu": "h200", "capacity": "16GiB"},
        },
        "spec": {"summary": "The spec alone", "value": EXAMPLE_SPEC},
    }
    return {
        "required": True,
        "content": {
            "application/json": {"schema": schema, "examples": examples},
            "application/yaml": {"schema": schema},
        },
    }


def add_spec_schema(schemas: dict[str, Any]) -> None:
    """Put the spec document and the sections that it is made of into the components of an OpenAPI document."""
    document = SpecDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= document.pop("$defs", {}) | {"SpecDocument": document}


def question_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    """The OpenAPI query parameters: every field of ``model`` but the spec."""
    properties = model.model_json_schema()["properties"]
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema.get("description", ""),
            "schema": {key: value for key, value in schema.items() if key not in ("title", "description", "examples")},
        }
        for name, schema in properties.items()
        if name != "spec"
    ]
