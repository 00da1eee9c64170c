"""What the environment says: where Postgres and DeepSeek are. Read once, by whoever composes a command."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Farthing's environment. A setting that is empty counts as not set."""

    model_config = SettingsConfigDict(env_prefix="FARTHING_", frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: SecretStr | None = None
    home: Path = Path(".farthing")
    api_key: SecretStr | None = Field(default=None, validation_alias="DEEPSEEK_API_KEY")
    base_url: str = Field(default="https://api.deepseek.com", validation_alias="DEEPSEEK_BASE_URL")
    #: Set by the sandbox, never by a user: the provider is the emulator, so figures are simulated.
    sandbox: bool = False
