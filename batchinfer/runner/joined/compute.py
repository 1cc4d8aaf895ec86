"""The pending shards together with other members: what this one computes of them, and how it ends.

Must not know: leases, how rows are computed.
"""

from __future__ import annotations

from batchinfer.errors import ConfigError
from batchinfer.runner.compute import Computed, Pulse, compute
from batchinfer.runner.ending import bad_input
from batchinfer.runner.host import Host
from batchinfer.runner.joined.alone import JointClaims
from batchinfer.runner.joined.joint import Joint
from batchinfer.runner.pipeline import Share
from batchinfer.runner.replicas.places import Places
from batchinfer.runner.session import Session
from batchinfer.runner.status import Status


def compute_joined(
    session: Session, host: Host, status: Status, heartbeat: Pulse, places: Places | None
) -> Computed:
    """Take pieces until every pending shard is finished, by this member or another.

    Raises as `compute` does.
    """
    if places is not None:
        places.close()
        raise ConfigError(
            "a joined run computes on one device: start one with --join for each, with "
            "CUDA_VISIBLE_DEVICES set to its index and engine.devices: 1"
        )
    joint = Joint(session, host)
    claims = JointClaims(joint, session, host, lambda: status.capacity)
    joint.start()
    try:
        share = Share(claims, first_sequence=0)
        computed = compute(
            session, iter(claims), host, status, heartbeat, is_cautious=False, share=share
        )
    finally:
        joint.close()
    if (error := bad_input(joint.input_errors)) is not None:
        raise error
    return Computed({**computed.finished, **joint.totals}, computed.is_limited)
