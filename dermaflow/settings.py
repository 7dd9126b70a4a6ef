"""Settings that belong to the machine, not to a run: ``DERMAFLOW_*`` environment variables."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from dermaflow.errors import SettingError
from dermaflow.logs import JsonLines


class Settings(BaseSettings):
    """Read from the environment; a run's own choices stand in its recipe instead."""

    model_config = SettingsConfigDict(env_prefix="DERMAFLOW_", env_ignore_empty=True, extra="ignore")

    data: Path | None = Field(None, description="Folder of the real HAM10000, where a command gets no --data.")
    registry: str = Field("runs/registry", description="Model registry: a folder or s3://bucket/prefix.")
    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1, ge=1, description="CPU threads of a process, 1 or more."
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", description="DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["text", "json"] = Field("text", description="text, or json: an object a line, with run id.")
    pushgateway: str | None = Field(None, description="Pushgateway for figures of batches: http://host:9091.")


@lru_cache
def settings() -> Settings:
    """The settings of this process, read once.

    Raises:
        SettingError: A value is impossible.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        raise SettingError(
            repr(first["input"]), where=f"DERMAFLOW_{name.upper()}",
            expected=str(Settings.model_fields[name].description).rstrip("."),
            todo="change the environment variable, or unset it for the default",
        ) from error  # fmt: skip


def start_logging() -> None:
    """Send log lines to stderr with a time; called once by commands and workers."""
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonLines() if settings().log_format == "json" else text)
    handler.setLevel(settings().log_level)  # Flower's loggers set a lower level of their own: twenty lines a second
    logging.basicConfig(level=settings().log_level, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line a request, and Flower sends its own log by requests
    logging.getLogger("alembic").setLevel(logging.WARNING)  # a line a step when a server makes its database
