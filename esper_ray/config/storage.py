"""The part of a run file that says where the run is saved, and what to do if it cannot be."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from esper_ray.config.section import Positive, Rate, Section


class StorageConfig(Section):
    """Where the run is saved."""

    url: str = ""
    """The run's own prefix, any fsspec URL; by default `runs/RUN/checkpoints`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the file system, such as `endpoint_url`; never stored with the run."""
    replicas: list[str] = Field(default_factory=list)
    """URLs of further roots that get each commit right after `url` has it, and mend restores."""
    replica_options: dict[str, Any] | None = None
    """Arguments of the replicas' file systems; by default those of `options`. Never stored."""
    every_epochs: Positive = 10
    """Epochs between commits; one is also made at the end and whenever a seed enters GRAFTING."""
    timeout_s: Rate = 30.0
    """Seconds that a call to a remote store may take with its repetitions, plus one per MiB."""
    on_upload_error: Literal["fail", "warn"] = "fail"
    """`warn` trains on where a commit cannot be stored and stores it later; the last must be."""
    single_writer: Literal["checked", "unsafe"] = "checked"
    """`unsafe` admits a store without conditional writes, where a second writer does damage."""
    signing_key_env: str = ""
    """Environment variable that holds a key; with one, commits are signed, and others refused."""
    signing_key_file: str = ""
    """File that holds it instead."""

    @model_validator(mode="after")
    def _one_key(self) -> StorageConfig:
        if self.signing_key_env and self.signing_key_file:
            raise ValueError("signing_key_env and signing_key_file are both given, keep one")
        return self

    @property
    def access(self) -> dict[str, Any]:
        """How a Root is opened at any URL that this run reads or writes, as keywords."""
        return {
            "storage_options": self.options,
            "timeout_s": self.timeout_s,
            "unsafe": self.single_writer == "unsafe",
        }

    @property
    def replica_access(self) -> dict[str, Any]:
        """The same for the URLs of replicas."""
        own = self.replica_options
        return self.access | ({} if own is None else {"storage_options": own})
