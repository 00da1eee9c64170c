"""What the environment says: where Postgres and DeepSeek are. Read once, by whoever composes a command."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import AnyUrl, AwareDatetime, Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.engines import Engine
from schemas.money import Currency


class Settings(BaseSettings):
    """Farthing's environment. A setting that is empty counts as not set."""

    model_config = SettingsConfigDict(
        env_prefix="FARTHING_",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # an error of the whole would quote the key
    )

    database_url: SecretStr | None = None
    home: Path = Path(".farthing")
    api_key: SecretStr | None = Field(default=None, validation_alias="DEEPSEEK_API_KEY")
    base_url: str = Field(default="https://api.deepseek.com", validation_alias="DEEPSEEK_BASE_URL")
    #: Events as JSON lines on stderr, for a log collector.
    log_json: bool = False
    #: Metrics and traces by OpenTelemetry, to where its own variables (OTEL_EXPORTER_OTLP_…) say. Of attempts that
    #: are alike each `otel_every`-th is traced.
    otel: bool = False
    otel_every: int = Field(default=100, ge=1)
    #: A folder of price files that are added to the book that ships.
    prices: Path | None = None
    #: A folder where flows leave report pages, and the address of what serves it, for Prefect's pages to link to.
    reports: Path | None = None
    reports_url: str | None = None
    #: The price card, for a provider that has no `/user/balance` to tell it (a self-hosted one).
    currency: Currency | None = None
    #: Where lanes work, unless a run is asked for with `--lanes-on`.
    lanes_on: Engine = Engine.PROCESSES
    #: The Dask scheduler or the Ray head to use, like tcp://10.0.0.5:8786 or ray://10.0.0.5:10001; none: a cluster
    #: on this machine for as long as the run.
    cluster: str | None = None
    #: How many seconds a run waits for one of Prefect's workers, or a slot of a cluster, to take a lane.
    workers_within_s: float = Field(default=120.0, gt=0)
    #: Set by the sandbox, never by a user: the provider is the emulator, so figures are simulated, and its
    #: seconds are `time_scale` of ours.
    sandbox: bool = False
    time_scale: float = Field(default=1.0, ge=0)
    #: Where the sandbox's clock starts, to see another tariff; default: now.
    sandbox_clock: AwareDatetime | None = None

    @property
    def provider_digest(self) -> str:
        """The same for whoever asks the same provider; a digest, since an address may hold a token.

        A user's name and password in it are not compared, as keys are not.
        """
        url = AnyUrl(self.base_url)
        place = (url.scheme, url.host, url.port, (url.path or "").rstrip("/"), url.query)
        return f"sha256:{hashlib.sha256(repr(place).encode()).hexdigest()}"

    @property
    def key_digest(self) -> str:
        """What tells one API key, and so its account, from another: too short to be more, and no part of the key."""
        key = "" if self.api_key is None else self.api_key.get_secret_value()
        return hashlib.sha256(f"farthing api key {key}".encode()).hexdigest()[:16]

    @model_validator(mode="after")
    def _keep_the_sandbox_on_this_machine(self) -> Self:
        """Left over in a shell, the variable would book real money as simulated."""
        if self.sandbox and AnyUrl(self.base_url).host not in ("127.0.0.1", "localhost", "[::1]"):
            raise ValueError(
                "FARTHING_SANDBOX is set, but DEEPSEEK_BASE_URL is not on this machine: unset one of them"
            )
        return self
