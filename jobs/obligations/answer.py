"""What one software licence is and asks for; every quote must occur in the licence's text."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


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


class Kind(StrEnum):
    KEEP_NOTICE = "keep_notice"
    STATE_CHANGES = "state_changes"
    DISCLOSE_SOURCE = "disclose_source"
    SHARE_ALIKE = "share_alike"
    NO_ENDORSEMENT = "no_endorsement"
    NON_COMMERCIAL = "non_commercial"
    NO_DISTRIBUTION = "no_distribution"
    NO_MODIFICATION = "no_modification"
    PAY = "pay"
    INDEMNIFY = "indemnify"
    COMPLY_WITH_LAW = "comply_with_law"
    OTHER = "other"


class Obligation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    kind: Kind
    quote: Annotated[str, Field(min_length=10, max_length=300)]


class Terms(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=200)]
    owner: Annotated[str, Field(max_length=200)] | None
    spdx_key: Annotated[str, Field(max_length=80)] | None
    category: Category
    obligations: Annotated[list[Obligation], Field(max_length=8)]

    @field_validator("obligations")
    @classmethod
    def _quotes_occur(cls, obligations: list[Obligation], info: ValidationInfo) -> list[Obligation]:
        """A quote may differ from the text in white space only. The numbers are for the model, in a repair."""
        text = (info.context or {}).get("text")
        if text is None:
            raise ValueError("cannot be checked without the document's text")
        said = _flatten(text)
        absent = [str(number) for number, each in enumerate(obligations) if _flatten(each.quote) not in said]
        if absent:
            raise ValueError(f"quote {', '.join(absent)} does not occur in the document; copy it word for word")
        return obligations


def _flatten(text: str) -> str:
    return " ".join(text.split())
