"""The metrics that the coordinator computes (`queue/`), and those that actors and weight agents report to the learner.

The values are computed in the coordinator, in actors and in weight agents; tests check that every tag is declared here.
"""

from __future__ import annotations

from protocol.metric import Metric

_NOW = "value when the step is recorded"
_SO_FAR = "count since the learner's start"
_OVER_ACTORS = "sum over actors"
_OVER_ENGINES = "sum over engines whose weight agent reports"
_NO_ACTOR = "no actor is connected"
_NO_ENGINE = "no weight agent reports"

QUEUE_METRICS = (
    Metric(
        name="queue/running",
        chart="Groups running and buffered",
        reduction=_NOW,
        unit="groups",
        explanation="groups that are leased to actors and not received yet",
        healthy="at least the actors' slots divided by `learner.group_size`",
    ),
    Metric(
        name="queue/buffered",
        chart="Groups running and buffered",
        reduction=_NOW,
        unit="groups",
        explanation="groups that are stored and wait for the rest of their batch",
        healthy="above 0 with a small `learner/wait_s`. Near 0 with a long wait: the learner waits for actors; at "
        "(staleness_bound + 1) batches: actors wait for the learner",
    ),
    Metric(
        name="queue/waiting",
        chart="Groups to lease again",
        reduction=_NOW,
        unit="groups",
        explanation="groups that expired, failed or were refused, and will be leased again",
        healthy="0; briefly more after a crash",
    ),
    Metric(
        name="queue/trained",
        reduction="count since the run's start",
        unit="groups",
        explanation="groups that were trained",
        healthy="increases by one batch per step",
    ),
    Metric(
        name="queue/skipped",
        chart="Questions skipped",
        reduction="count since the run's start",
        unit="groups",
        explanation="questions that are not trained: zero variance (`learner.skip_zero_variance`), or too many failed "
        "or refused groups",
        healthy="small compared with `queue/trained`",
    ),
    Metric(
        name="queue/slots",
        chart="Trajectories and their engine requests",
        reduction=_NOW,
        unit="trajectories",
        explanation="trajectory slots of all actors (`actor.max_trajectories` each)",
        healthy="constant without faults",
    ),
    Metric(
        name="queue/slots_free",
        chart="Trajectories and their engine requests",
        reduction=_NOW,
        unit="trajectories",
        explanation="trajectory slots of all actors that no trajectory and no lease under way needs",
        healthy="near 0: actors are busy. If not, the staleness bound allows no more leases: raise "
        "`learner.staleness_bound` or `learner.groups_per_batch`, or use fewer slots",
    ),
    Metric(
        name="queue/actors",
        chart="Actors and engines",
        reduction=_NOW,
        unit="actors",
        explanation="actors that send heartbeats",
        healthy="the number in the run file",
    ),
    Metric(
        name="queue/actors_refused",
        chart="Actors and engines",
        reduction=_SO_FAR,
        unit="actors",
        explanation="actors that were refused because their config or their files differ from the run's; the learner's "
        "log names the keys",
        healthy="0",
    ),
    Metric(
        name="queue/engines",
        chart="Actors and engines",
        reduction=_NOW,
        unit="engines",
        explanation="engines that have committed a version and whose weight agent reports",
        healthy="the number in the run file",
    ),
    Metric(
        name="queue/expired",
        chart="Leases expired, groups refused",
        reduction=_SO_FAR,
        unit="leases",
        explanation="leases that ended without a group, because their actor died or did not receive them",
        healthy="0 without faults",
    ),
    Metric(
        name="queue/refused",
        chart="Leases expired, groups refused",
        reduction=_SO_FAR,
        unit="groups",
        explanation="groups that break a rule of the run",
        healthy="0 without faults",
    ),
    Metric(
        name="queue/malformed",
        reduction=_SO_FAR,
        unit="messages",
        explanation="messages that break the protocol",
        healthy="0 without faults",
    ),
    Metric(
        name="queue/overtaken",
        chart="Tokens over the bound",
        reduction=_SO_FAR,
        unit="groups",
        explanation="stragglers that exchanged slots with a group of a later batch (`learner.straggler_timeout_s`)",
        healthy="rare; if it is not, raise the time-out",
    ),
    Metric(
        name="queue/failed_trajectories",
        reduction=_SO_FAR,
        unit="trajectories",
        explanation="trajectories with status FAILED of all actors, also of those that have ended; "
        "`trajectories/failures` and progress.json name the reasons",
        healthy="0",
    ),
    Metric(
        name="queue/failed_in_a_row",
        reduction=_NOW,
        unit="groups",
        explanation="groups that failed or were refused since the last accepted one; `learner.max_failed_groups` of "
        "them end the run",
        healthy="0",
    ),
    Metric(
        name="queue/skipped_in_a_row",
        reduction=_NOW,
        unit="groups",
        explanation="groups that `learner.skip_zero_variance` skipped since the last accepted one; "
        "`learner.max_skipped_groups` of them end the run",
        healthy="small; otherwise the questions are too easy or too hard",
    ),
    Metric(
        name="queue/store_full",
        reduction=_SO_FAR,
        unit="writes",
        explanation="writes that failed because the disk is full; no group is admitted until there is room",
        healthy="0; otherwise free space or set `learner.retention`",
    ),
)

ACTOR_METRICS = (
    Metric(
        name="actor/trajectories_running",
        chart="Trajectories and their engine requests",
        reduction=_OVER_ACTORS,
        unit="trajectories",
        explanation="trajectories that are being rolled out",
        healthy="near `queue/slots`",
        absent_if=_NO_ACTOR,
    ),
    Metric(
        name="actor/trajectories_done",
        reduction=_OVER_ACTORS,
        unit="trajectories",
        explanation="trajectories that ended since the start of their actor",
        absent_if=_NO_ACTOR,
    ),
    Metric(
        name="actor/trajectories_failed",
        chart="Failed trajectories by kind",
        reduction=_OVER_ACTORS,
        unit="trajectories",
        explanation="trajectories with status FAILED since the start of their actor: an engine, a tool, the workflow "
        "or the reward raised an error",
        healthy="0; the reasons are in the actors' logs",
        absent_if=_NO_ACTOR,
    ),
    Metric(
        name="actor/failed_{kind}",
        chart="Failed trajectories by kind",
        reduction=_OVER_ACTORS,
        unit="trajectories",
        explanation="FAILED trajectories of one kind, such as `SearchFailed` or `workflow_TypeError`; the 16 most "
        "frequent kinds of each actor",
        healthy="absent",
        absent_if="no trajectory failed in this way",
    ),
    Metric(
        name="actor/engine_requests",
        chart="Trajectories and their engine requests",
        reduction=_OVER_ACTORS,
        unit="requests",
        explanation="running generation requests to engines",
        healthy="near `actor/trajectories_running`: trajectories spend little time outside of engines",
        absent_if=_NO_ACTOR,
    ),
    Metric(
        name="actor/engine_retries",
        reduction=_OVER_ACTORS,
        unit="requests",
        explanation="generations that were discarded and requested again, since the start of their actor",
        healthy="0 without faults",
        absent_if=_NO_ACTOR,
    ),
    Metric(
        name="actor/resident_mb",
        reduction=_OVER_ACTORS,
        unit="MB",
        explanation="resident memory of the actor process",
        healthy="steady if the number of actors is constant",
        absent_if=_NO_ACTOR,
    ),
)

ENGINE_METRICS = (
    Metric(
        name="engine/updates",
        chart="Weight updates of engines",
        reduction=_OVER_ENGINES,
        unit="updates",
        explanation="versions that the weight agent installed in its engine, since the agent's start",
        healthy="increases by one per step and engine",
        absent_if=_NO_ENGINE,
    ),
    Metric(
        name="engine/failures",
        chart="Weight updates of engines",
        reduction=_OVER_ENGINES,
        unit="failures",
        explanation="reports and updates of the weight agent that failed, since the agent's start",
        healthy="0",
        absent_if=_NO_ENGINE,
    ),
    Metric(
        name="engine/paused_s",
        reduction=_OVER_ENGINES,
        unit="s",
        explanation="time from pause to continue, summed over all updates since the agent's start",
        healthy="per update and engine, a small part of a step",
        absent_if=_NO_ENGINE,
    ),
    Metric(
        name="engine/fetched_bytes",
        reduction=_OVER_ENGINES,
        unit="bytes",
        explanation="chunks of weights received since the agent's start",
        healthy="the size of the deltas",
        absent_if=_NO_ENGINE,
    ),
    Metric(
        name="engine/repeated_chunks",
        reduction=_OVER_ENGINES,
        unit="chunks",
        explanation="chunks of weights that were damaged or lost and requested again, since the agent's start",
        healthy="0",
        absent_if=_NO_ENGINE,
    ),
)
