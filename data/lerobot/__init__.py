"""LeRobot folders as a data set: files (``layout``), conventions (``guess``), episodes (``reader``), wrong claims (``audit``)."""

from data.lerobot.reader import LerobotSource

__all__ = ["LerobotSource"]
