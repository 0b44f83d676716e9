"""The shapes world: generated pictures of coloured shapes with bilingual captions, questions and dialogues."""

from lavis.data.shapes.build import ShapesSpec, ensure_shapes
from lavis.data.shapes.scene import HELD_OUT, Item, Scene, render, sample_scene

__all__ = ["HELD_OUT", "Item", "Scene", "ShapesSpec", "ensure_shapes", "render", "sample_scene"]
