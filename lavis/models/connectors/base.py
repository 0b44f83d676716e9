"""What a connector is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from lavis.models.part import Part
from lavis.models.parts import ConnectorConfig
from lavis.weights.tensors import LoadReport, load_tensors
from lavis.weights.trained import read_trained


class Connector(Part, ABC):
    """[N, T, D_tower] vectors of the tower -> [N, config.span(T), D_llm] inputs of the LLM, in two steps.

    `encode` is what can be kept when it is frozen together with the tower (a Q-Former's output; the tower's own vectors
    by default); `project` is the rest. Checkpoints call its tensors by their names inside the connector.
    """

    config: ConnectorConfig
    encoder_prefixes: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of the tensors that `encode` uses."""

    @classmethod
    def from_config(cls, config: Any, tower_width: int, llm_width: int) -> Connector:
        """The connector of its section, with new weights (on the meta device where that is the default device)."""
        return cls(config, tower_width, llm_width)

    def encode(self, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """What may be cached when `encoder_frozen`."""
        return vectors_NTD

    @property
    def encoder_frozen(self) -> bool:
        """Whether `encode` can never change."""
        return True

    @abstractmethod
    def project(self, encoded_NTD: torch.Tensor) -> torch.Tensor:
        """What `encode` gave, in the LLM's embedding space."""

    def forward(self, vectors_NTD: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.project(self.encode(vectors_NTD))

    def load(self, source: str) -> LoadReport:
        """From a run, a checkpoint or a weight file that holds it; names of other parts' tensors are left out."""
        tensors = self.own_tensors(read_trained(source))
        heads = {name.partition(".")[0] for name in self.state_dict()}
        return load_tensors(
            self,
            tensors,
            file=source,
            wanted=lambda name: True,
            ignored=lambda name: name.partition(".")[0] not in heads,
        )

    def own_tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A file's tensors by the connector's own names, where another program wrote it."""
        return dict(tensors)
