"""What is asked for in one object, and as keywords."""

from dataclasses import fields
from typing import get_type_hints

import pytest
from torch import nn

from hikui.lowering.app.request import Request, RequestOptions
from hikui.lowering.errors import UsageError


def test_the_keywords_are_the_fields_beside_the_model() -> None:
    keywords = get_type_hints(RequestOptions)
    hints = get_type_hints(Request, localns={"nn": nn})
    assert keywords == {field.name: hints[field.name] for field in fields(Request) if field.name != "model"}


def test_a_request_without_a_recipe_lowers_nothing() -> None:
    with pytest.raises(UsageError, match="no recipe says how"):
        Request("reference", None).loaded_recipe()
