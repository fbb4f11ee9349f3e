"""Rollout stores: episodes on disk, as LeRobotDataset v3.0 folders (Parquet and JSON) with extra features.

    writer = RolloutWriter(folder, space)
    writer.write("job", [Episode(...)])
    writer.finalize()
    for episode in read_episodes(folder): ...

The extra features are ``vla_action``, ``vla_confidence``, ``vla_features`` (the teacher's output at the visited state) and
``action.source`` (who acted). Only pyarrow and json are needed to write a store, so that a robot can record.

Writers put one shard per job under ``.shards/`` (temporary name, fsync, rename), so a killed recording leaves whole
episodes only; :func:`finalize` orders shards by job id and numbers episodes and frames. One writer or many, killed and
started again or not, the same jobs give the same store.
"""

from spvla.store.episode import VECTOR_COLUMNS, Episode
from spvla.store.lerobot_v3 import finalize
from spvla.store.reader import read_action_space, read_episode_table, read_episodes
from spvla.store.writer import RolloutWriter

__all__ = [
    "VECTOR_COLUMNS",
    "Episode",
    "RolloutWriter",
    "finalize",
    "read_action_space",
    "read_episode_table",
    "read_episodes",
]
