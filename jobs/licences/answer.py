"""The category of one software licence."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Category(StrEnum):
    CLA = "CLA"
    COMMERCIAL = "Commercial"
    COPYLEFT = "Copyleft"
    COPYLEFT_LIMITED = "Copyleft Limited"
    FREE_RESTRICTED = "Free Restricted"
    PATENT_LICENSE = "Patent License"
    PERMISSIVE = "Permissive"
    PROPRIETARY_FREE = "Proprietary Free"
    PUBLIC_DOMAIN = "Public Domain"
    SOURCE_AVAILABLE = "Source-available"
    UNSTATED_LICENSE = "Unstated License"


class Licence(BaseModel):
    """The confidence comes second, so that it is about an answer that has been given."""

    model_config = ConfigDict(extra="forbid")

    category: Category
    confidence: Annotated[float, Field(ge=0, le=1)]
