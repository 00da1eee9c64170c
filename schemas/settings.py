"""What the environment says: where Postgres and DeepSeek are. Read once, by whoever composes a command."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.money import Currency


class Settings(BaseSettings):
    """Farthing's environment. A setting that is empty counts as not set."""

    model_config = SettingsConfigDict(env_prefix="FARTHING_", frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: SecretStr | None = None
    home: Path = Path(".farthing")
    api_key: SecretStr | None = Field(default=None, validation_alias="DEEPSEEK_API_KEY")
    base_url: str = Field(default="https://api.deepseek.com", validation_alias="DEEPSEEK_BASE_URL")
    #: Events as JSON lines on stderr, for a log collector.
    log_json: bool = False
    #: The price card, for a provider that has no `/user/balance` to tell it (a self-hosted one).
    currency: Currency | None = None
    #: Set by the sandbox, never by a user: the provider is the emulator, so figures are simulated, and its
    #: seconds are `time_scale` of ours.
    sandbox: bool = False
    time_scale: float = Field(default=1.0, ge=0)
