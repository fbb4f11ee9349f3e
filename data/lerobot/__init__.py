"""A LeRobot folder as a data set: its files (layout), conventions (guess), episodes (reader) and wrong claims (audit)."""

from data.lerobot.reader import LerobotSource

__all__ = ["LerobotSource"]
