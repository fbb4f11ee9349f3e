"""Recording into a rollout store, one atomic shard per job."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spvla.actions import ActionSpace
from spvla.errors import InputError
from spvla.files import writing
from spvla.store.episode import Episode
from spvla.store.lerobot_v3 import finalize, require_own
from spvla.store.shards import require_features, shard_info, shard_metadata, shard_schema, to_table


class RolloutWriter:
    """Writes episodes into a rollout store, one atomic shard per job.

    Args:
        folder: the store; made if absent, extended if it is one already.
        space: the action space all episodes share. An existing store of another one is refused.
        policy: who acted or labelled, for the record.
        measured: :func:`finalize` gives the store's action space the scale and bounds of the actions found.

    Raises:
        InputError: a store of another action space, or a folder with ``data`` or ``meta`` that are not a store's.
    """

    def __init__(self, folder: str | Path, space: ActionSpace, policy: str = "", measured: bool = False) -> None:
        self.folder = Path(folder)
        self.space = space
        self.policy = policy
        self.measured = measured
        self.shards = self.folder / ".shards"
        require_own(self.folder)
        self.shards.mkdir(parents=True, exist_ok=True)
        for shard in sorted(self.shards.glob("*.parquet"))[:1]:
            theirs = ActionSpace.from_dict(shard_info(shard)["action_space"], str(shard))
            space.require_compatible(theirs, f"{self.folder} (existing store)")

    def shard_path(self, job: str) -> Path:
        """Where the shard of ``job`` is (or will be)."""
        if not job or any(c in job for c in "/\\\0") or job.startswith("."):
            raise InputError(f"job id {job!r} cannot be a file name")
        return self.shards / f"{job}.parquet"

    def finished(self, job: str) -> bool:
        """Whether the shard of ``job`` is whole on disk."""
        return self.shard_path(job).exists()

    def write(self, job: str, episodes: Sequence[Episode]) -> None:
        """Write the episodes of ``job`` and make them durable; a second write of the same job replaces the first.

        Raises:
            InputError: no episodes, one that is not whole, or features that differ from those of the store's other shards;
                nothing is written then.
        """
        path = self.shard_path(job)
        tables: list[pa.Table] = []
        with os.scandir(self.shards) as entries:  # any shard will do, and there may be many
            other = next((Path(e) for e in entries if e.name.endswith(".parquet") and e.name != path.name), None)
        expected = None if other is None else (shard_schema(other), str(other))
        for i, episode in enumerate(episodes):
            what = f"job {job}, episode {i}"
            episode.check(self.space, what)
            table = to_table(episode)
            expected = expected or (table.schema, f"job {job}, episode 0")
            require_features(table.schema, *expected, what)
            tables.append(table.select(expected[0].names))
        if not tables:
            raise InputError(f"job {job}: no episodes")
        info = {
            "action_space": self.space.to_dict(),
            "policy": self.policy,
            "measured": self.measured,
            "episodes": [
                {"length": len(e), "instruction": e.instruction, "success": e.success, "metadata": e.metadata} for e in episodes
            ],
        }
        try:
            text = json.dumps(info)
        except (TypeError, ValueError) as error:
            raise InputError(f"job {job}: metadata or success cannot be written as JSON ({error})") from None
        table = pa.concat_tables(tables).replace_schema_metadata(shard_metadata(text.encode()))
        with writing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)

    def finalize(self) -> Path:
        """See :func:`finalize`."""
        return finalize(self.folder)
