"""Decides whether an actor may work for the run: its identity must agree with the run's. Pure."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from protocol.identity_differences import differences
from protocol.messages import Heartbeat

log = logging.getLogger(__name__)

# Incarnations of refused actors that are remembered, so that each is logged and counted once.
_MAX_REMEMBERED = 1_024
_MAX_DIFFERENCES = 5
_MAX_REASON_CHARS = 1_000


class IdentityCheck:
    """`identity`: the run's (`protocol.run_identity.actor_identity`); empty: every actor is accepted.

    `num_refused`: refused actors, each incarnation counted once.
    """

    def __init__(self, identity: Mapping[str, str]) -> None:
        self._identity = dict(identity)
        self._refused: dict[tuple[str, str], None] = {}
        self.num_refused = 0

    def refusal(self, heartbeat: Heartbeat) -> str:
        """Returns why the sender must not work for the run: each key that differs. Empty if it may."""
        if heartbeat.identity == self._identity:
            return ""
        problems = differences(self._identity, heartbeat.identity)
        if not problems:
            return ""
        shown = "; ".join(problems[:_MAX_DIFFERENCES])
        if len(problems) > _MAX_DIFFERENCES:
            shown += f"; and {len(problems) - _MAX_DIFFERENCES} more"
        reason = f"{shown:.{_MAX_REASON_CHARS}}: start it with the run's config.json and the same files"
        incarnation = (heartbeat.actor, heartbeat.incarnation)
        if incarnation not in self._refused:
            self._refused[incarnation] = None
            if len(self._refused) > _MAX_REMEMBERED:
                del self._refused[next(iter(self._refused))]
            self.num_refused += 1
            log.warning("actor %r is refused: %s", heartbeat.actor, reason)
        return reason
