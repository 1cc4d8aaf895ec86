"""The pending shards together with other members: what this one computes of them, and how it ends.

Must not know: leases, how rows are computed.
"""

from __future__ import annotations

from functools import partial

from batchinfer.runner.compute import Computed, Pulse, compute
from batchinfer.runner.ending import bad_input
from batchinfer.runner.host import Host
from batchinfer.runner.joined.alone import JointClaims
from batchinfer.runner.joined.joint import Joint
from batchinfer.runner.joined.shards import JoinedShards
from batchinfer.runner.pipeline import Share
from batchinfer.runner.replicas.fleet import compute_on_replicas
from batchinfer.runner.replicas.places import Places
from batchinfer.runner.session import Session
from batchinfer.runner.status import Status


def compute_joined(
    session: Session, host: Host, status: Status, heartbeat: Pulse, places: Places | None
) -> Computed:
    """Take pieces until every pending shard is finished, by this member or another.

    Raises as `compute` does.
    """
    joint = Joint(session, host)
    joint.start()
    try:
        if places is None:
            computed = _compute_here(session, host, status, heartbeat, joint)
        else:
            shards_of = partial(JoinedShards, joint=joint)
            computed = compute_on_replicas(session, host, status, heartbeat, places, shards_of)
    finally:
        joint.close()
    if (error := bad_input(joint.input_errors)) is not None:
        raise error
    return Computed({**computed.finished, **joint.totals}, computed.is_limited)


def _compute_here(
    session: Session, host: Host, status: Status, heartbeat: Pulse, joint: Joint
) -> Computed:
    claims = JointClaims(joint, session, host, lambda: status.capacity)
    share = Share(claims, first_sequence=0)
    return compute(session, iter(claims), host, status, heartbeat, is_cautious=False, share=share)
