"""`torch_lab.modules` under the name that older projects know."""

from __future__ import annotations

from torch_lab.modules import LabModule, TrainLabModule

__all__ = ["LabModule", "TrainLabModule"]
