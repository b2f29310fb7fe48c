"""Base classes of config sections, and types of fields that several sections have."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65_535)]
Seconds = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Use = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$|^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="A built-in name, or an import path `package.module:Name` of your own code.",
    ),
]


class Section(BaseModel):
    """A section of the run file: immutable, unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Options(BaseModel):
    """Base class of an extension's options, which are keys of its section in the run file. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ExtensionSection(BaseModel):
    """A section whose `use` names an extension. The keys beside the section's own are the extension's options.

    They are kept as plain values here and validated by the extension's `Options` model in the process that loads it.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    use: Use

    @property
    def options(self) -> dict[str, Any]:
        """The extension's options, not yet validated."""
        return dict(self.model_extra or {})
