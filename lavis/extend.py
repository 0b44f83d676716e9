"""What a plug-in imports: the registries, what is registered in them, and the nouns these work on.

A recipe names the file in its `imports:`; docs/extending.md has one worked file for each kind of part. The names here
stay where they are when modules of the program move.
"""

from __future__ import annotations

from lavis.config.schema import DataEntry, NamedFile, opt
from lavis.config.sections import ObjectiveConfig, OptimConfig
from lavis.core.errors import ConfigError, DataError, LavisError
from lavis.core.output import LossOutput
from lavis.core.registries import (
    CONNECTORS,
    DIALECTS,
    EXPORTERS,
    LR_SCHEDULES,
    MEDIA_FORMATS,
    METRICS,
    OBJECTIVES,
    SOURCES,
    TOWERS,
)
from lavis.core.types import (
    IGNORE_INDEX,
    Batch,
    Conversation,
    Document,
    Example,
    MediaRef,
    Message,
    Pair,
    RowError,
)
from lavis.data.dialects import Dialect
from lavis.data.files import OnError, Row
from lavis.data.sources import FileSource
from lavis.eval.answers import Answer, normalize
from lavis.eval.metrics import Metric
from lavis.export.base import Exporter, Written
from lavis.export.trained import Trained
from lavis.models.connectors.base import Connector
from lavis.models.parts import ConnectorConfig, TowerConfig
from lavis.models.scoring import Scorer
from lavis.models.towers.base import Tower
from lavis.objectives.base import Actors, Objective
from lavis.objectives.sft import NextToken
from lavis.tokens.media import MediaFormat
from lavis.train.schedules import Horizon
from lavis.weights.tensors import LoadReport, load_tensors

__all__ = [
    "CONNECTORS",
    "DIALECTS",
    "EXPORTERS",
    "IGNORE_INDEX",
    "LR_SCHEDULES",
    "MEDIA_FORMATS",
    "METRICS",
    "OBJECTIVES",
    "SOURCES",
    "TOWERS",
    "Actors",
    "Answer",
    "Batch",
    "ConfigError",
    "Connector",
    "ConnectorConfig",
    "Conversation",
    "DataEntry",
    "DataError",
    "Dialect",
    "Document",
    "Example",
    "Exporter",
    "FileSource",
    "Horizon",
    "LavisError",
    "LoadReport",
    "LossOutput",
    "MediaFormat",
    "MediaRef",
    "Message",
    "Metric",
    "NamedFile",
    "NextToken",
    "Objective",
    "ObjectiveConfig",
    "OnError",
    "OptimConfig",
    "Pair",
    "Row",
    "RowError",
    "Scorer",
    "Tower",
    "TowerConfig",
    "Trained",
    "Written",
    "load_tensors",
    "normalize",
    "opt",
]
