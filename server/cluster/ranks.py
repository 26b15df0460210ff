"""The ranks of a replica's model as actors, each with the resources of a bundle of its own."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from reft_runtime.parallel.processes import END_SECONDS
from reft_runtime.quiet import hide_import_messages


class PlacementGroup:
    """Starts ranks in the placement group of this actor (`reft_runtime.parallel.launch.Launcher`).

    This actor is rank 0, in the first bundle; rank i is an actor in bundle i. All end with this.
    """

    def __init__(self) -> None:
        self.host: str = ray.util.get_node_ip_address()
        self._group = get_current_placement_group()

    def device(self, rank: int) -> int:
        """See `Launcher.device`: Ray lets an actor see its own devices alone."""
        return 0

    def launch(self, rank: int, host: str, port: int, key: bytes) -> _Rank:
        """See `Launcher.launch`."""
        assert self._group is not None
        bundle = self._group.bundle_specs[rank]
        actor = _Follower.options(  # type: ignore[attr-defined]
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            memory=bundle.get("memory"),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=self._group, placement_group_bundle_index=rank
            ),
        ).remote()
        return _Rank(actor, actor.follow.remote(host, port, key, rank))


class _Rank:
    """A rank that was started (`reft_runtime.parallel.launch.Rank`)."""

    def __init__(self, actor: Any, end: ray.ObjectRef[None]) -> None:
        self._actor, self._end = actor, end

    def how_ended(self, seconds: float = 0.0) -> str | None:
        """See `Rank.how_ended`."""
        ended, _ = ray.wait([self._end], timeout=seconds)
        if not ended:
            return None
        try:
            ray.get(self._end)
        except RayError as error:
            return f"ended: {str(error).splitlines()[0]}"
        return "ended"

    def end(self) -> None:
        """See `Rank.end`."""
        if self.how_ended(END_SECONDS) is None:
            self.kill()

    def kill(self) -> None:
        """See `Rank.kill`."""
        ray.kill(self._actor)


@ray.remote(max_restarts=0)
class _Follower:
    """An actor that is a rank."""

    def follow(self, host: str, port: int, key: bytes, rank: int) -> None:
        """Follow rank 0 until it ends, which ends this process."""
        hide_import_messages()
        from reft_runtime.parallel.follower import follow

        follow(host, port, key, rank)
